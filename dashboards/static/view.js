// The page works without this file; with it, panels refresh in place, plots can be read with mouse and keys, findings
// open in a drawer. It asks this host only, and puts what comes into the page through the parser, never as script.
"use strict";

const $ = (selector, within = document) => within.querySelector(selector);
const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const root = document.documentElement;

/* ---- reading plots: one cursor over all plots of the same time axis; the legend shows the values under it ---- */

let cursor = null; // index of the bucket under the cursor, or null

function plotParts(plot) {
  const rows = $("tbody", plot)?.rows;
  const legend = $(".legend", plot.parentElement);
  return rows && legend ? { rows, outputs: all("output", legend), line: $(".cursor", plot) } : null;
}

function readAt(index) {
  cursor = index;
  for (const plot of all("[data-plot]")) {
    const parts = plotParts(plot);
    if (!parts) continue;
    const row = index === null ? null : parts.rows[Math.min(index, parts.rows.length - 1)];
    parts.line.hidden = row === null;
    if (row) {
      parts.line.style.left = `${(100 * (row.sectionRowIndex + 0.5)) / parts.rows.length}%`;
      parts.line.dataset.time = row.cells[0].textContent.slice(11);
      parts.line.classList.toggle("left", row.sectionRowIndex > parts.rows.length * 0.8);
    }
    parts.outputs.forEach((output, series) => {
      output.dataset.newest ??= output.textContent;
      output.textContent = row ? row.cells[series + 1].textContent : output.dataset.newest;
    });
  }
}

document.addEventListener("pointermove", (event) => {
  const canvas = event.target.closest?.(".canvas");
  if (!canvas) {
    if (cursor !== null && !document.activeElement?.matches("[data-plot]")) readAt(null);
    return;
  }
  const parts = plotParts(canvas.closest("[data-plot]"));
  if (!parts) return;
  const box = canvas.getBoundingClientRect();
  const index = Math.floor(((event.clientX - box.left) / box.width) * parts.rows.length);
  readAt(Math.max(0, Math.min(parts.rows.length - 1, index)));
});

document.addEventListener("focusout", (event) => { if (event.target.matches?.("[data-plot]")) readAt(null); });

function moveCursor(plot, key) {
  const count = plotParts(plot)?.rows.length;
  if (!count) return false;
  const from = cursor ?? count - 1;
  const to = { ArrowLeft: from - 1, ArrowRight: from + 1, Home: 0, End: count - 1, PageUp: from - 10, PageDown: from + 10 }[key];
  if (to === undefined) return false;
  readAt(Math.max(0, Math.min(count - 1, to)));
  return true;
}

/* ---- refreshing: each panel by itself, so that a slow or broken one harms no other ---- */

const live = $("#live");
const pause = $("#pause");
const refreshSeconds = Number(live?.dataset.refresh || 0);
const underway = new Set();
let paused = false;
let failures = 0;

const parsed = (text) => new DOMParser().parseFromString(text, "text/html");

async function refreshPanel(panel) {
  const name = panel.dataset.panel;
  if (underway.has(name) || panel.contains(document.activeElement) && !document.activeElement.matches("[data-plot]")) return;
  underway.add(name);
  try {
    const address = new URL(`/panel/${name}`, location.origin);
    address.search = location.search;
    address.searchParams.set("part", "1");
    if (panel.closest(".alone")) address.searchParams.set("large", "1");
    const answer = await fetch(address, { signal: AbortSignal.timeout(30000) });
    if (!answer.ok) throw new Error(String(answer.status));
    const fresh = $(".panel", parsed(await answer.text()));
    const focused = panel.contains(document.activeElement);
    const open = all("details", panel).map((details) => details.open);
    const scrolled = $(".scroll", panel)?.scrollTop || 0;
    panel.replaceWith(document.adoptNode(fresh));
    all("details", fresh).forEach((details, index) => { details.open = open[index] || false; });
    if (scrolled && $(".scroll", fresh)) $(".scroll", fresh).scrollTop = scrolled;
    if (focused) $("[data-plot]", fresh)?.focus();
  } finally {
    underway.delete(name);
  }
}

async function refresh() {
  const results = await Promise.allSettled(all("main > * > [data-panel]").map(refreshPanel));
  failures = results.some((result) => result.status === "rejected") ? failures + 1 : 0;
  root.classList.toggle("stale", failures > 0);
  if (failures === 0) live.textContent = `${new Date().toISOString().slice(11, 19)} UTC`;
  else live.textContent = "No answer from the view; showing what was last known";
  if (cursor !== null) readAt(cursor);
}

async function keepFresh() {
  for (;;) {
    await new Promise((wake) => setTimeout(wake, 1000 * refreshSeconds * Math.min(6, 1 + failures)));
    if (!paused && !document.hidden) await refresh();
  }
}

function togglePause() {
  paused = !paused;
  pause.textContent = paused ? "Resume" : "Pause";
  pause.setAttribute("aria-pressed", String(paused));
  if (!paused) refresh();
}

/* ---- the drawer: a finding beside the overview ---- */

const drawer = $("#drawer");
let openedFrom = null;

async function openFinding(link) {
  const address = new URL(link.href.baseVal ?? link.href, location.origin);
  const whole = address.href;
  address.searchParams.set("part", "1");
  openedFrom = link;
  drawer.hidden = false;
  drawer.replaceChildren("Loading…");
  try {
    const answer = await fetch(address, { signal: AbortSignal.timeout(30000) });
    const body = parsed(await answer.text()).body;
    const close = Object.assign(document.createElement("button"), { type: "button", textContent: "Close" });
    const page = Object.assign(document.createElement("a"), { href: whole, textContent: "Open as a page" });
    const tools = document.createElement("p");
    tools.className = "tools";
    tools.append(page, close);
    close.addEventListener("click", closeDrawer);
    drawer.replaceChildren(tools, ...body.childNodes);
    showButtons(drawer);
    drawer.focus();
  } catch {
    location.assign(whole);
  }
}

function closeDrawer() {
  drawer.hidden = true;
  drawer.replaceChildren();
  openedFrom?.focus?.();
}

/* ---- buttons, links and keys ---- */

function showButtons(within) {
  all("button[hidden]", within).forEach((button) => { button.hidden = false; });
}

async function copyText(button) {
  const source = document.getElementById(button.dataset.copy);
  try {
    await navigator.clipboard.writeText(source.textContent);
    button.textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(source);
    button.textContent = "Selected";
  }
}

function switchTheme() {
  const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = dark ? "light" : "dark";
  try { localStorage.setItem("inferwatch-theme", root.dataset.theme); } catch { /* then it lasts for this page */ }
}

document.addEventListener("click", (event) => {
  const copy = event.target.closest?.("[data-copy]");
  if (copy) copyText(copy);
  const link = event.target.closest?.("a[data-finding]");
  if (link && drawer && !event.ctrlKey && !event.metaKey && !event.shiftKey && event.button === 0) {
    event.preventDefault();
    openFinding(link);
  }
});

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.("input, textarea, select")) return;
  if (event.key === "Escape") {
    if (drawer && !drawer.hidden) closeDrawer();
    readAt(null);
  } else if (event.target.matches?.("[data-plot]") && moveCursor(event.target, event.key)) {
    event.preventDefault();
  } else if (event.key === "p" && refreshSeconds) {
    togglePause();
  } else if (event.key === "r" && refreshSeconds) {
    refresh();
  } else if (event.key === "t") {
    switchTheme();
  } else if (/^[1-5]$/.test(event.key)) {
    $(`[data-range="${event.key}"]`)?.click();
  }
});

pause?.addEventListener("click", togglePause);
$("#theme")?.addEventListener("click", switchTheme);
showButtons(document);
if (refreshSeconds) keepFresh();
root.dataset.ready = "true";
