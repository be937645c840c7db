"use strict";
// Everything from a score file becomes a text node; nothing is parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20;

function element(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const down = head.getAttribute("aria-sort") !== "descending";
    heads.forEach((other) => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      const [x, y] = [value(a), value(b)];
      const numbers = x !== "" && y !== "" && !isNaN(x) && !isNaN(y);
      return numbers ? Number(x) - Number(y) : x.localeCompare(y);
    };
    const rows = [...table.tBodies[0].rows].sort(compare);
    if (down) rows.reverse();
    table.tBodies[0].append(...rows);
  }));
}

function answer(question, side) {
  const score = question.scores[side];
  const name = side === 0 ? data.names[0] : data.names[question.pair];
  const box = element("p", "answer " + (score > question.scores[1 - side] ? "right" : "wrong"));
  box.append(element("b", "", name), element("span", "dim", ` (score ${score}): `));
  box.append(element("span", "", question.missing[side] ? "no answer" : question.answers[side] || "(empty)"));
  if (question.rotations[side]) box.append(element("small", "", "\nrotations: " + question.rotations[side]));
  return box;
}

function card(question) {
  const article = element("article", "card");
  const left = element("div");
  if (question.image) {
    const picture = element("img");
    picture.src = data.images[question.image];
    picture.alt = "picture of the question";
    left.append(picture);
  } else {
    left.append(element("p", "no-picture", "no picture"));
  }
  const right = element("div");
  const where = [question.benchmark, question.category, "id " + question.id].filter(Boolean).join(" · ");
  right.append(element("p", "dim", where), element("p", "question", question.question));
  if (question.choices.length) {
    right.append(element("p", "", question.choices.map((text, n) => "ABCDEFGH"[n] + ". " + text).join("\n")));
  }
  const truth = element("p", "truth");
  truth.append(element("b", "", "truth: "), element("span", "", question.truth));
  right.append(truth, answer(question, 0), answer(question, 1));
  article.append(left, right);
  return article;
}

const control = (name) => document.getElementById(name);
const gain = (question) => question.scores[1] - question.scores[0];
let page = 0;

function fill(name, pairs) {
  for (const [value, text] of pairs) {
    const option = element("option", "", text);
    option.value = value;
    control("filter-" + name).append(option);
  }
}

function chosen() {
  const benchmark = control("filter-benchmark").value;
  const pair = control("filter-pair").value;
  const outcome = control("filter-outcome").value;
  const category = control("filter-category").value;
  const words = control("filter-text").value.toLowerCase();
  const matches = data.questions.filter((question) =>
    (!benchmark || question.benchmark === benchmark) &&
    (!pair || String(question.pair) === pair) &&
    (!outcome || (outcome === "new") === (gain(question) > 0)) &&
    (!category || question.category === category) &&
    (!words || [question.question, question.truth, ...question.answers].join("\n").toLowerCase().includes(words)));
  const order = control("sort").value;
  if (order === "gap") matches.sort((a, b) => Math.abs(gain(b)) - Math.abs(gain(a)));
  if (order === "question" || order === "category") matches.sort((a, b) => a[order].localeCompare(b[order]));
  return matches;
}

function show() {
  const questions = chosen();
  const pages = Math.max(1, Math.ceil(questions.length / PAGE));
  page = Math.min(Math.max(page, 0), pages - 1);
  control("shown").textContent = `${questions.length} of ${data.questions.length} questions in this page`;
  control("place").textContent = `${page + 1} / ${pages}`;
  control("previous").disabled = page === 0;
  control("next").disabled = page === pages - 1;
  control("questions").replaceChildren(...questions.slice(page * PAGE, (page + 1) * PAGE).map(card));
}

// Filters are kept in the fragment of the address, so that a link reproduces the view.
const CHOICES = ["filter-benchmark", "filter-pair", "filter-outcome", "filter-category", "filter-text", "sort"];
const short = (name) => name.replace("filter-", "");

function remember() {
  const pairs = CHOICES.map((name) => [short(name), control(name).value]).filter(([, value]) => value);
  history.replaceState(null, "", pairs.length ? "#" + new URLSearchParams(pairs) : location.pathname);
}

function restore() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  CHOICES.filter((name) => wanted.has(short(name))).forEach((name) => { control(name).value = wanted.get(short(name)); });
}

document.querySelectorAll("#differences").forEach(sortable);
if (control("controls")) {
  const unique = (values) => [...new Set(values)].filter(Boolean);
  fill("benchmark", unique(data.questions.map((question) => question.benchmark)).map((name) => [name, name]));
  fill("pair", unique(data.questions.map((question) => question.pair)).map((n) => [n, data.names[n]]));
  control("filter-pair").parentElement.hidden = data.names.length < 3;
  fill("outcome", [["new", "new better"], ["base", "base better"]]);
  fill("category", unique(data.questions.map((question) => question.category)).sort().map((name) => [name, name]));
  control("controls").addEventListener("input", () => { page = 0; remember(); show(); });
  control("controls").addEventListener("submit", (event) => event.preventDefault());
  control("previous").addEventListener("click", () => { page -= 1; show(); });
  control("next").addEventListener("click", () => { page += 1; show(); });
  restore();
  show();
}
