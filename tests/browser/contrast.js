// The texts of the page whose contrast to what they lie on is below 4.5 to 1 (WCAG 2, relative luminance).
(() => {
  const canvas = Object.assign(document.createElement("canvas"), { width: 1, height: 1 });
  const pen = canvas.getContext("2d", { willReadFrequently: true });

  const painted = (...layers) => {
    pen.clearRect(0, 0, 1, 1);
    for (const layer of layers) {
      pen.fillStyle = layer;
      pen.fillRect(0, 0, 1, 1);
    }
    return [...pen.getImageData(0, 0, 1, 1).data];
  };
  const linear = (part) => (part / 255 <= 0.03928 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4);
  const luminance = ([red, green, blue]) => 0.2126 * linear(red) + 0.7152 * linear(green) + 0.0722 * linear(blue);
  const grounds = (element) => {
    const layers = [];
    for (let e = element; e; e = e.parentElement) layers.unshift(getComputedStyle(e).backgroundColor);
    return ["white", ...layers];
  };
  const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());

  const poor = new Set();
  for (const element of document.querySelectorAll("body *")) {
    if (!hasText(element) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const under = grounds(element);
    const text = luminance(painted(...under, element instanceof SVGElement ? style.fill : style.color));
    const ground = luminance(painted(...under));
    const ratio = (Math.max(text, ground) + 0.05) / (Math.min(text, ground) + 0.05);
    const name = element.className.baseVal ?? element.className;
    if (ratio < 4.5) poor.add(`${name}: ${element.textContent.slice(0, 20)} ${ratio.toFixed(2)}`);
  }
  return [...poor];
})()
