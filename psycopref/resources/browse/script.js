// Rows of the index; blocks of packed records are unpacked when somebody looks. Nothing written by a model or a client becomes markup: `make`
// appends text as text, and the table shows text alone.
const index = JSON.parse(document.getElementById("index").textContent);
const blocks = document.querySelectorAll("script.block");
const place = new Map(index.rows.map((row, i) => [row[0], i]));
const unpacked = new Map();
const article = document.getElementById("speech");
let current = -1, table = null, reasonsShown = false;

function make(tag, traits, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(traits || {})) node.setAttribute(name, value);
  node.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function unpack(block) {
  if (!unpacked.has(block)) {
    const bytes = Uint8Array.from(atob(blocks[block].textContent), (letter) => letter.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    unpacked.set(block, new Response(stream).json());
  }
  return unpacked.get(block);
}

const ends = { length: "cut at the limit", sentence: "ended with its sentence" };

function card(title, text, end, tags, ...more) {
  const heading = make("h3", {}, title, tags.map((tag) => make("span", { class: `tag ${tag.split(" ")[0]}` }, tag)));
  const note = ends[end] ? make("p", { class: "soft" }, ends[end]) : null;
  return make("div", { class: "card" }, heading, make("p", { class: "text" }, text || "(no words)"), note, ...more);
}

function rated(answer) {
  if (!answer.ratings) return null;
  const marks = make("ul", { class: "marks" }), reasons = make("dl", {});
  index.principles.forEach((name, i) => {
    const [rating, reason] = answer.ratings[i] || [null, ""];
    marks.append(make("li", {}, make("b", {}, String(rating ?? "—")), ` ${name}`));
    if (reason) reasons.append(make("dt", {}, name), make("dd", {}, reason));
  });
  if (!reasons.children.length) return marks;
  const more = make("details", { class: "reasons" }, make("summary", {}, "The rater's reasons"), reasons);
  more.open = reasonsShown;
  return [marks, more];
}

function pool(record) {
  if (!record.pool.length) return null;
  const cards = record.pool.map((answer, i) => {
    const tags = [];
    record.pairs.forEach(([chosen, rejected], n) => {
      const which = record.pairs.length > 1 ? ` in pair ${n + 1}` : "";
      if (chosen === i) tags.push(`chosen${which}`);
      if (rejected === i) tags.push(`rejected${which}`);
    });
    const mean = answer.mean === null ? "not rated" : `mean rating ${answer.mean.toFixed(2)}`;
    return card(answer.model, answer.text, answer.end, tags, make("p", { class: "soft" }, mean), rated(answer));
  });
  const said = record.pairs.length ? `${record.pairs.length} of their pairs ${record.pairs.length === 1 ? "is" : "are"} a preference` : "No pair of them is a preference";
  return [make("h2", {}, "Answers of the pool"), make("p", { class: "soft" }, `${said}. Rated by ${index.rater}.`), make("div", { class: "cards" }, cards)];
}

function policies(record) {
  return Object.entries(record.policies).flatMap(([setting, answers]) => [
    make("h2", {}, `Answers to the test, ${index.settings[setting] || setting}`),
    make("div", { class: "cards" }, answers.map((answer) => card(answer.policy, answer.text, answer.end, []))),
  ]);
}

function verdicts(record) {
  if (!record.verdicts.length) return null;
  const judges = [...new Set(record.verdicts.map((one) => one.judge))];
  const rows = [...new Set(record.verdicts.map((one) => JSON.stringify([one.setting, one.policy])))].map((key) => {
    const [setting, policy] = JSON.parse(key);
    const cells = judges.map((judge) => {
      const found = record.verdicts.find((one) => one.judge === judge && one.setting === setting && one.policy === policy);
      return make("td", {}, found ? found.orders.join(" · ") : "—");
    });
    return make("tr", {}, make("td", {}, policy), make("td", {}, index.settings[setting] || setting), cells);
  });
  const head = make("tr", {}, ["policy", "setting", ...judges].map((name) => make("th", { scope: "col" }, name)));
  return [
    make("h2", {}, "Verdicts against the reference"),
    make("p", { class: "soft" }, "For the policy: shown first · shown second. A judge of rewards or lengths knows no order."),
    make("div", { class: "scroll" }, make("table", { class: "verdicts" }, make("thead", {}, head), make("tbody", {}, rows))),
  ];
}

function training(record) {
  if (!record.training.length) return null;
  return [
    make("h2", {}, "Answers along training"),
    make("p", { class: "soft" }, "Of a development speech: one answer of each point, sampled while the policy was watched."),
    make("div", { class: "cards" }, record.training.map((answer) => {
      const reward = answer.reward === null ? null : make("p", { class: "soft" }, `reward ${answer.reward.toFixed(3)}`);
      return card(answer.point, answer.text, answer.end, [], reward);
    })),
  ];
}

function render(record) {
  const facts = [record.topic, record.coarse, record.split, record.source].filter(Boolean).join(" · ");
  const why = { topic: "its topic is one of crises", words: "its words are some of the screen's" }[record.crisis];
  const warning = why ? make("p", { class: "crisis" }, `This may be somebody in a crisis (${why}). What models answered is no help; whoever needs some finds it at findahelpline.com.`) : null;
  article.replaceChildren(
    make("h2", { id: "name" }, record.id), make("p", { class: "soft" }, facts), ...[warning].filter(Boolean),
    make("blockquote", {}, record.speech), ...[pool(record), policies(record), verdicts(record), training(record)].flat().filter(Boolean),
  );
}

function named() { // the id in the address; what is no code of anything is taken as it stands
  const said = location.hash.slice(1);
  try { return decodeURIComponent(said); } catch { return said; }
}

function lookAt() { if (article.getBoundingClientRect().top > innerHeight * 0.6) article.scrollIntoView(); }

function showReasons() {
  reasonsShown = !reasonsShown;
  for (const more of article.querySelectorAll("details.reasons")) more.open = reasonsShown;
}

function shownOrder() {
  return table ? table.rows({ search: "applied", order: "applied" }).indexes().toArray() : index.rows.map((_, i) => i);
}

function mark() {
  for (const row of document.querySelectorAll("#speeches tr.current")) row.classList.remove("current");
  const node = table ? table.row(current).node() : document.querySelector(`#speeches tr[data-i="${current}"]`);
  if (node) { node.classList.add("current"); node.scrollIntoView({ block: "nearest" }); }
}

async function open(i, turn = true) {
  current = i;
  const record = (await unpack(Math.floor(i / index.block)))[i % index.block];
  if (current !== i) return; // another was asked for meanwhile
  render(record);
  const at = table ? shownOrder().indexOf(i) : -1;
  if (at >= 0 && turn) table.page(Math.floor(at / table.page.len())).draw("page");
  mark();
  if (named() !== record.id && !index.embedded) history.replaceState(null, "", `#${encodeURIComponent(record.id)}`);
  document.documentElement.dataset.open = record.id;
}

function step(by) {
  const order = shownOrder();
  if (!order.length) return;
  const at = order.indexOf(current);
  open(order[at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + by))]);
}

function options(id, column) {
  const select = document.getElementById(id);
  for (const value of [...new Set(index.rows.map((row) => row[column]))].sort()) select.append(make("option", { value }, value));
  return select;
}

function filter() {
  const exact = (value) => (value ? `^${value.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")}$` : "");
  table.search(document.getElementById("search").value);
  table.column(1).search(exact(document.getElementById("topic").value), { regex: true, smart: false });
  table.column(2).search(exact(document.getElementById("split").value), { regex: true, smart: false });
  table.column(3).search(document.getElementById("crisis").checked ? "^c" : "", { regex: true, smart: false });
  table.draw();
  mark();
}

function build() {
  const names = ["id", "topic", "split", "crisis", "gap", "speech"];
  // DataTables reads entities in what it searches through an element's innerHTML: it gets no "&"
  const words = (data) => String(data ?? "").replaceAll("&", " ");
  const plain = (data, type) => (type === "display" ? make("span", {}, String(data ?? "—")) : type === "filter" ? words(data) : data);
  table = jQuery("#speeches").DataTable({
    data: index.rows, deferRender: true, pageLength: 20, lengthChange: false, order: [], autoWidth: false,
    layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: "paging" },
    columns: names.map((title, i) => ({
      title, className: title === "speech" ? "opening-cell" : "", width: ["21%", "25%", "12%", "12%", "11%", "19%"][i],
      render: (data, type) => (type === "display" && i === 5 ? make("span", { class: "opening" }, data.slice(0, 90)) : plain(data, type)),
    })),
  });
  options("topic", 1); options("split", 2);
  document.getElementById("search").addEventListener("input", filter);
  for (const id of ["topic", "split", "crisis"]) document.getElementById(id).addEventListener("change", filter);
  jQuery("#speeches tbody").on("click", "tr", function () { const i = table.row(this).index(); if (i !== undefined) open(i, false).then(lookAt); });
}

function buildFew() {
  document.getElementById("filters").hidden = true;
  const body = make("tbody", {}, index.rows.map((row, i) => {
    const line = make("tr", { "data-i": i }, make("td", {}, row[0]), make("td", {}, make("span", { class: "opening" }, row[5])));
    line.addEventListener("click", () => open(i).then(lookAt));
    return line;
  }));
  document.getElementById("speeches").append(body);
}

document.documentElement.classList.toggle("dark", matchMedia("(prefers-color-scheme: dark)").matches);
document.getElementById("filters").addEventListener("submit", (event) => event.preventDefault());
if (typeof jQuery === "undefined") buildFew(); else build();

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  const writing = ["INPUT", "SELECT", "TEXTAREA"].includes(event.target.tagName);
  if (event.key === "Escape" && writing) { event.target.blur(); return; }
  if (writing) return;
  const act = {
    j: () => step(1), ArrowDown: () => step(1), k: () => step(-1), ArrowUp: () => step(-1),
    "/": () => document.getElementById("search").focus(), r: showReasons,
  }[event.key];
  if (act) { event.preventDefault(); act(); }
});
function follow() { const i = place.get(named()); if (i !== undefined && i !== current) open(i); }
addEventListener("hashchange", follow);
follow();
if (current < 0 && index.rows.length) open(0);
