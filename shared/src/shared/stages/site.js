// Everything that a page of the site does by itself. Without this script all of it can be read, only not searched.
"use strict";
const page = document.documentElement;
const dark = matchMedia("(prefers-color-scheme: dark)");

function remembered() {
  try { return localStorage.getItem("theme"); } catch { return null; } // some browsers refuse it to local files
}

if (remembered()) page.dataset.theme = remembered(); // before anything is drawn

function switchTheme() {
  const now = page.dataset.theme || (dark.matches ? "dark" : "light");
  page.dataset.theme = now === "dark" ? "light" : "dark";
  try { localStorage.setItem("theme", page.dataset.theme); } catch { /* then it lasts for this page */ }
}

// A link may lead into something folded: open what is around its target.
function unfold() {
  const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
  if (!target) return;
  for (let box = target; box; box = box.parentElement) if (box.tagName === "DETAILS") box.open = true;
  target.scrollIntoView();
}

// ------------------------------------------------------------------ search

// The index is fetched when the first letter is typed: as a script, because a page
// that was opened from a file may fetch nothing.
let loading = null;
function load() {
  loading ??= new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = "search.js";
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
  return loading;
}

// A word as it stands in a regular expression: its signs mean themselves.
function literal(word) {
  return word.replace(/[.*+?^${}()|[\]\\/]/g, "\\$&");
}

// All words must occur. A heading counts more than a text, the beginning of a word more than its middle.
// Tests come last.
function find(words) {
  const starts = words.map((word) => new RegExp("(^|[^\\p{L}\\p{N}])" + literal(word), "iu"));
  const found = [];
  for (const entry of SEARCH.entries) {
    const [, , heading, text] = entry.map((part) => part.toLowerCase());
    if (!words.every((word) => heading.includes(word) || text.includes(word))) continue;
    let score = heading.startsWith("test_") ? -12 : text ? 0 : 2;
    words.forEach((word, i) => {
      score += (heading.includes(word) ? 4 : 0) + (starts[i].test(heading) ? 4 : 0) + (starts[i].test(text) ? 2 : 0);
    });
    found.push([score, entry]);
  }
  return found.sort((a, b) => b[0] - a[0]).map(([, entry]) => entry);
}

// A piece of the text around the first word, the words marked.
function snippet(text, words) {
  const low = text.toLowerCase();
  const at = Math.max(0, Math.min(...words.map((word) => low.indexOf(word)).filter((i) => i >= 0), text.length) - 60);
  const part = (at ? "… " : "") + text.slice(at, at + 180) + (at + 180 < text.length ? " …" : "");
  const line = document.createElement("span");
  part.split(new RegExp(`(${words.map(literal).join("|")})`, "iu")).forEach((bit, i) => {
    const piece = i % 2 ? document.createElement("mark") : document.createTextNode("");
    piece.textContent = bit;
    line.append(piece);
  });
  return line;
}

async function search(box, results) {
  const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
  results.hidden = !words.length;
  if (!words.length) return;
  const [status, list] = results.children;
  try { await load(); } catch { status.textContent = "search.js is missing beside this page"; return; }
  const found = find(words);
  status.textContent = found.length > 30 ? `${found.length} places, the first 30` : `${found.length || "no"} places`;
  list.replaceChildren(...found.slice(0, 30).map(([name, anchor, heading, text]) => {
    const item = document.createElement("li"), link = document.createElement("a"), title = document.createElement("b");
    link.href = anchor ? `${name}#${anchor}` : name;
    title.textContent = heading;
    link.append(title, heading === SEARCH.pages[name] ? "" : ` ${SEARCH.pages[name]}`);
    if (text) link.append(snippet(text, words));
    item.append(link);
    return item;
  }));
}

function setUpSearch() {
  const box = document.getElementById("search"), results = document.getElementById("results");
  box.addEventListener("input", () => search(box, results));
  document.addEventListener("keydown", (event) => {
    const links = [...results.querySelectorAll("a")];
    const at = links.indexOf(document.activeElement);
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName);
    if (event.key === "/" && !typing && !event.ctrlKey && !event.metaKey && !event.altKey) {
      event.preventDefault();
      box.focus();
    } else if (event.key === "Escape" && !results.hidden) {
      results.hidden = true;
      box.focus();
    } else if (event.key === "Enter" && document.activeElement === box && links.length && !results.hidden) {
      links[0].click();
    } else if (!results.hidden && (at >= 0 || document.activeElement === box) && /^Arrow(Up|Down)$/.test(event.key)) {
      event.preventDefault();
      const next = at + (event.key === "ArrowDown" ? 1 : -1);
      (links[next] || (next < 0 ? box : links[at]))?.focus();
    }
  });
  document.addEventListener("click", (event) => {
    if (!results.contains(event.target) && event.target !== box) results.hidden = true;
    if (event.target.closest("#results a")) results.hidden = true; // the link may lead into this very page
  });
}

// ------------------------------------------------------------------ the difference, the ladder, printing

function setUpFold(button) {
  const changes = [...document.querySelectorAll("details.change")];
  const name = () => { button.textContent = changes.every((change) => change.open) ? "Close all" : "Open all"; };
  button.hidden = false;
  button.addEventListener("click", () => {
    const open = !changes.every((change) => change.open);
    changes.forEach((change) => { change.open = open; });
    name();
  });
  changes.forEach((change) => change.addEventListener("toggle", name));
  name();
}

function setUpLadder(ladder) {
  const list = ladder.querySelector("ol"), rows = [...list.children];
  const quantity = ladder.querySelector(".quantity"), order = ladder.querySelector(".order");
  const draw = () => {
    const key = quantity.value, value = (row) => (row.dataset[key] === undefined ? NaN : Number(row.dataset[key]));
    const scale = key === "loss" ? (x) => x : Math.log; // sizes differ by factors of thousands
    const known = rows.map(value).filter((x) => !Number.isNaN(x)).map(scale);
    const low = Math.min(...known), span = Math.max(...known) - low || 1;
    for (const row of rows) {
      const x = value(row), dot = row.querySelector(".dot");
      dot.hidden = Number.isNaN(x);
      if (!dot.hidden) dot.style.left = `${(100 * (scale(x) - low)) / span}%`;
      const few = { maximumSignificantDigits: 3, notation: "compact" }; // 135M
      const told = key === "loss" ? x.toFixed(3) : x.toLocaleString("en", few);
      row.querySelector(".value").textContent = Number.isNaN(x) ? "–" : told;
    }
    const rank = (row) => (Number.isNaN(value(row)) ? Infinity : value(row));
    const by = (a, b) => (rank(a) === rank(b) ? 0 : rank(a) - rank(b));
    list.append(...(order.value === "value" ? [...rows].sort(by) : rows));
  };
  ladder.querySelector(".controls").hidden = false;
  quantity.addEventListener("change", draw);
  order.addEventListener("change", draw);
  draw();
}

// On paper the difference stands open; checkpoints and traps stay as they are.
let closed = [];
addEventListener("beforeprint", () => {
  closed = [...document.querySelectorAll("details.change:not([open])")];
  closed.forEach((change) => { change.open = true; });
});
addEventListener("afterprint", () => closed.forEach((change) => { change.open = false; }));

document.addEventListener("DOMContentLoaded", () => {
  document.querySelector(".tools").hidden = false;
  document.getElementById("theme").addEventListener("click", switchTheme);
  setUpSearch();
  document.querySelectorAll(".fold").forEach(setUpFold);
  document.querySelectorAll(".ladder").forEach(setUpLadder);
  if (location.hash) unfold();
});
addEventListener("hashchange", unfold);
