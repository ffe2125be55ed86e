// Sets the chosen theme before the page is drawn, so that a dark page never flashes white.
"use strict";
{
  let chosen = null;
  try { chosen = localStorage.getItem("inferwatch-theme"); } catch { /* storage may be forbidden: the system decides */ }
  const root = document.documentElement;
  if (!root.dataset.theme && (chosen === "light" || chosen === "dark")) root.dataset.theme = chosen;
}
