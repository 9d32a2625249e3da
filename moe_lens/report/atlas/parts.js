"use strict";
// What all pages are built of: data that is loaded from the disk, and elements whose text is never read as HTML.
const loaded = new Map(), waiting = new Map();

function take(name, data) {
  loaded.set(name, data);
}

function load(name) {
  if (loaded.has(name)) return Promise.resolve(loaded.get(name));
  if (!waiting.has(name)) {
    waiting.set(name, new Promise((done, failed) => {
      const script = document.createElement("script");
      script.src = `atlas/${encodeURIComponent(name)}.js`;
      script.onload = () => (loaded.has(name) ? done(loaded.get(name)) : script.onerror());
      script.onerror = () => {
        waiting.delete(name);
        failed(new Error(`the atlas has no ${name}`));
      };
      document.head.append(script);
    }));
  }
  return waiting.get(name);
}

function element(parent, tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== undefined) made.textContent = text;  // never as HTML: the data may hold any text
  parent.append(made);
  return made;
}

function link(parent, hash, text, name) {
  const made = element(parent, "a", name, text);
  made.href = `#${hash}`;
  return made;
}

const toExpert = (parent, layer, expert) => link(parent, `expert/${layer}/${expert}`, `${layer}.${expert}`);
const toToken = (parent, id, text) => link(parent, `token/${id}`, visible(text), "token");
const visible = (text) => text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "·") || "∅";
const whole = (value) => String(Math.round(value)).replace(/\B(?=(\d{3})+$)/g, "\u2009");

function number(value, digits = 3) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  if (size && (size < 0.5 * 10 ** -digits || size >= 1e5)) return value.toExponential(1);
  return value.toFixed(size >= 1000 ? 0 : size >= 100 ? 1 : digits);
}
const between = (low, high, digits) => (low === null ? "" : `${number(low, digits)} to ${number(high, digits)}`);

// A table of rows, each a list of values or of functions that fill their cell; heads that begin with # are of numbers.
function table(parent, heads, rows) {
  const made = element(element(parent, "div", "scroll"), "table");
  const kinds = heads.map((head) => (head.startsWith("#") ? "number" : ""));
  const top = element(made, "tr");
  heads.forEach((head, i) => element(top, "th", kinds[i], head.replace(/^#/, "")));
  for (const row of rows) {
    const line = element(made, "tr");
    row.forEach((cell, i) => {
      if (typeof cell === "function") cell(element(line, "td", kinds[i]));
      else element(line, "td", kinds[i], cell);
    });
  }
  return made;
}

function section(parent, heading, sentence, name) {
  const made = element(parent, "section", name || "");
  element(made, "h2", "", heading);
  if (sentence) element(made, "p", "note", sentence);
  return made;
}

// Colours an element by a value, from nothing to `top`; below zero in another colour.
function heat(made, value, top) {
  made.classList.add("heat");
  made.classList.toggle("none", value === null);
  made.classList.toggle("negative", value !== null && value < 0);
  made.style.setProperty("--v", value === null || !top ? 0 : Math.min(1, Math.abs(value) / top).toFixed(3));
}

// Experts as a grid: layers down and experts across, on a phone the other way. values: one for each, in order.
function grid(parent, values, { each = false, say = number } = {}) {
  const { layers, experts } = loaded.get("shared");
  const made = element(parent, "div", "grid");
  made.style.setProperty("--experts", experts);
  made.style.setProperty("--layers", layers.length);
  const at = (child, l, e) => {
    child.style.setProperty("--l", l);
    child.style.setProperty("--e", e);
  };
  const sized = (own) => Math.max(...own.map((value) => Math.abs(value ?? 0)), 1e-12);
  const top = sized(values), step = experts > 24 ? 4 : 1;
  for (let e = 0; e < experts; e += step) at(element(made, "span", "", e), -1, e);
  layers.forEach((layer, l) => {
    const own = values.slice(l * experts, (l + 1) * experts), highest = each ? sized(own) : top;
    at(element(made, "span", "", layer), l, -1);
    own.forEach((value, e) => {
      const cell = link(made, `expert/${layer}/${e}`);
      cell.title = `layer ${layer}, expert ${e}: ${say(value)}`;
      cell.setAttribute("aria-label", cell.title);
      at(cell, l, e);
      heat(cell, value, highest);
    });
  });
  return top;
}

function legend(parent, values, top, each) {
  const box = element(parent, "span", "scale"), negative = values.some((value) => value < 0);
  element(box, "span", "", each ? "0" : number(negative ? -top : 0));
  const bar = element(box, "i");
  const ends = negative ? "var(--below), var(--cell), var(--much)" : "var(--cell), var(--much)";
  bar.style.background = `linear-gradient(to right in oklab, ${ends})`;
  element(box, "span", "", each ? "highest of the layer" : number(top));
}
