"use strict";
// The house's colour scales (moe_lens/plots/style.py): from nothing to much, and from below zero to above.
const SEQUENTIAL = [[255, 255, 255], [86, 180, 233], [0, 75, 117]];
const DIVERGING = [[213, 94, 0], [255, 255, 255], [0, 114, 178]];

function mix(scale, share) {
  const place = Math.min(1, Math.max(0, share)) * (scale.length - 1);
  const low = Math.min(scale.length - 2, Math.floor(place));
  return scale[low].map((from, i) => Math.round(from + (scale[low + 1][i] - from) * (place - low)));
}
const css = (rgb) => `rgb(${rgb.join(",")})`;
const amount = (value, top) => mix(SEQUENTIAL, top ? value / top : 0);
const change = (value, top) => mix(DIVERGING, 0.5 + (top ? value / top / 2 : 0));
const inkOn = ([r, g, b]) => (0.299 * r + 0.587 * g + 0.114 * b < 140 ? "#fff" : "#222");
const gradient = (scale) => `linear-gradient(to right, ${scale.map(css).join(",")})`;

function element(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;  // never as HTML: a prompt may hold any text
  parent.append(made);
  return made;
}

function legend(parent, scale, left, right, text) {
  const box = element(parent, "span", "scale");
  element(box, "span", "", left);
  element(box, "i").style.background = gradient(scale);
  element(box, "span", "", text ? `${right} ${text}` : right);
}

// A line of text beside the pointer.
const tip = element(document.body, "div", "tip");
tip.hidden = true;
function showTip(event, text) {
  tip.hidden = !text;
  tip.textContent = text || "";
  const wide = tip.offsetWidth, room = document.documentElement.clientWidth - wide - 8;
  tip.style.left = Math.max(4, Math.min(event.clientX + 14, room)) + "px";
  tip.style.top = event.clientY + 18 + "px";
}
const visible = (token) => JSON.stringify(token);
