"use strict";
// Everything from a score file becomes a text node; nothing is parsed as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 20;
const control = (name) => document.getElementById(name);
const gain = (question) => question.scores[1] - question.scores[0];
// of an option: A to Z, then its number
const letter = (n) => "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[n] || String(n + 1);
let page = 0;

function element(tag, className, text) {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function answer(question, side) {
  const score = question.scores[side];
  const box = element("p", "answer " + (score > question.scores[1 - side] ? "right" : "wrong"), "");
  const said = question.missing[side] ? "no answer" : question.answers[side] || "(empty)";
  box.append(element("b", "", data.names[side && question.pair]), element("span", "dim", ` (score ${score}): `), said);
  if (question.rotations[side]) box.append(element("small", "", "\nrotations: " + question.rotations[side]));
  return box;
}

function card(question) {
  const article = element("article", "card", "");
  const left = element("div", "dim", question.image ? "" : "no picture");
  if (question.image) {
    const picture = element("img", "", "");
    picture.src = data.images[question.image];
    picture.alt = "picture of the question";
    left.append(picture);
  }
  const right = element("div", "", "");
  const where = [question.benchmark, question.category, "id " + question.id].filter(Boolean).join(" · ");
  const choices = question.choices.map((text, n) => "\n" + letter(n) + ". " + text).join("");
  right.append(element("p", "dim", where), element("p", "question", question.question + choices));
  right.append(element("p", "truth", "truth: " + question.truth), answer(question, 0), answer(question, 1));
  article.append(left, right);
  return article;
}

function fill(name, pairs) {
  for (const [value, text] of pairs) {
    const option = element("option", "", text);
    option.value = value;
    control("filter-" + name).append(option);
  }
}

function chosen() {
  const [benchmark, pair, outcome, text] = ["benchmark", "pair", "outcome", "text"].map((n) => control("filter-" + n).value);
  return data.questions.filter((question) =>
    (!benchmark || question.benchmark === benchmark) &&
    (!pair || String(question.pair) === pair) &&
    (!outcome || (outcome === "new") === (gain(question) > 0)) &&
    [question.question, question.truth, question.category, ...question.answers].join("\n").toLowerCase().includes(text.toLowerCase()));
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

if (control("controls")) {
  const unique = (values) => [...new Set(values)];
  fill("benchmark", unique(data.questions.map((question) => question.benchmark)).map((name) => [name, name]));
  fill("pair", unique(data.questions.map((question) => question.pair)).map((n) => [n, data.names[n]]));
  control("filter-pair").parentElement.hidden = data.names.length < 3;
  fill("outcome", [["new", "new better"], ["base", "base better"]]);
  control("controls").addEventListener("input", () => { page = 0; show(); });
  control("controls").addEventListener("submit", (event) => event.preventDefault());
  control("previous").addEventListener("click", () => { page -= 1; show(); });
  control("next").addEventListener("click", () => { page += 1; show(); });
  show();
}
