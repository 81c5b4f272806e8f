"use strict";
// Everything a row says is untrusted: it goes into the page as text content alone, never as HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const PAGE = 60;

function element(tag, className, text) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  if (text !== undefined && text !== null) made.textContent = text;
  return made;
}

// A route as a strip: one cell for each layer and router, coloured by expert.
function strip(route, label) {
  const made = element("div", "strip");
  const cells = route.map((expert, at) => {
    const colour = data.colours[expert % data.colours.length];
    return `${colour} ${(100 * at) / route.length}% ${(100 * (at + 1)) / route.length}%`;
  });
  if (cells.length) made.style.background = `linear-gradient(90deg, ${cells.join(", ")})`;
  made.title = `${label}: ${route.join(" ")}`;
  return made;
}

function verdict(row) {
  const right = (row.text || "").trim() === row.truth.trim();
  return element("div", `truth ${right ? "right" : "wrong"}`, `${right ? "✓" : "✗"} truth: ${row.truth}`);
}

function card(row) {
  const made = element("button", "card");
  made.type = "button";
  const shots = element("div", "shots");
  for (const picture of row.pictures.slice(0, 3)) {
    const image = element("img");
    image.src = picture;
    image.alt = "";
    image.loading = "lazy";
    shots.append(image);
  }
  if (!row.pictures.length) shots.append(element("span", "", "no picture"));
  const words = element("div", "words");
  words.append(element("div", "id", row.id), element("div", "prompt clamp", row.prompt));
  words.append(row.error ? element("div", "error clamp answer", row.error) : element("div", "clamp answer", row.text));
  if (row.truth !== null && !row.error) words.append(verdict(row));
  if (row.flags.length) {
    const flags = element("div");
    row.flags.forEach((flag) => flags.append(element("span", "chip", flag)));
    words.append(flags);
  }
  if (row.prefill.length) {
    const routes = element("div", "routes");
    routes.append(strip(row.prefill, "prefill"), strip(row.decode, "decode"));
    words.append(routes);
  }
  made.append(shots, words);
  made.addEventListener("click", () => show(row));
  return made;
}

function show(row) {
  const detail = document.getElementById("detail");
  const body = detail.querySelector("div");
  body.replaceChildren();
  for (const picture of row.pictures) {
    const image = element("img");
    image.src = picture;
    image.alt = `picture of row ${row.id}`;
    body.append(image);
  }
  const [prompt, visual, answer] = row.tokens;
  const told = { id: row.id, prompt: row.prompt, answer: row.text, truth: row.truth, error: row.error };
  told.flags = row.flags.join(", ");
  told["finish reason"] = row.finish;
  if (answer !== null) told.tokens = `${prompt} in the prompt, ${visual} of them visual; ${answer} new`;
  // One behind the other: a column may be called as one of ours is, and must not stand in its place.
  const facts = [...Object.entries(told), ...Object.entries(row.extras)];
  const table = element("table");
  for (const [name, value] of facts) {
    if (value === null || value === undefined || value === "") continue;
    const line = element("tr");
    line.append(element("th", "", name), element("td", "", value));
    table.append(line);
  }
  for (const phase of ["prefill", "decode"]) {
    if (!row[phase].length) continue;
    const line = element("tr");
    const cell = element("td");
    cell.append(strip(row[phase], phase), element("code", "", row[phase].join(" ")));
    line.append(element("th", "", `${phase} experts`), cell);
    table.append(line);
  }
  const scroll = element("div", "scroll");
  scroll.append(table);
  body.append(scroll);
  detail.showModal();
}

const filters = document.getElementById("filters");
const cards = document.getElementById("cards");
const more = document.getElementById("more");
let matching = [];

function draw(from) {
  const next = matching.slice(from, from + PAGE).map(card);
  if (from === 0) cards.replaceChildren(...next);
  else cards.append(...next);
  more.hidden = cards.childElementCount >= matching.length;
}

function filter() {
  const wanted = Object.fromEntries(new FormData(filters));
  const text = wanted.text.toLowerCase();
  matching = data.rows.filter(
    (row) =>
      (!wanted.why || row.why === wanted.why) &&
      (!wanted.status || row.status === wanted.status) &&
      (!wanted.flag || row.flags.includes(wanted.flag)) &&
      (!wanted.pattern || row.pattern === wanted.pattern) &&
      (!text || [row.id, row.prompt, row.text, row.error].some((own) => (own || "").toLowerCase().includes(text))),
  );
  document.getElementById("count").value = `${matching.length} of ${data.rows.length}`;
  draw(0);
}

function options(name, values) {
  const select = filters.elements[name];
  const found = [...new Set(values)].filter((value) => value !== "").sort();
  found.forEach((value) => select.append(new Option(value, value)));
  if (!found.length) select.parentElement.hidden = true;
}

options("why", data.rows.map((row) => row.why));
options("status", data.rows.map((row) => row.status));
options("flag", data.rows.flatMap((row) => row.flags));
options("pattern", data.rows.map((row) => row.pattern));
filters.addEventListener("input", filter);
filters.addEventListener("submit", (event) => event.preventDefault());
more.addEventListener("click", () => draw(cards.childElementCount));
document.getElementById("detail").addEventListener("click", (event) => {
  if (event.target.id === "detail") event.target.close();
});

document.querySelectorAll(".link").forEach((link) =>
  link.addEventListener("click", () => {
    filters.reset();
    const { search, flag, pattern } = link.dataset;
    if (search) filters.elements.text.value = search;
    if (flag) filters.elements.flag.value = flag;
    if (pattern) filters.elements.pattern.value = pattern;
    filter();
    document.getElementById("sheet").scrollIntoView();
  }),
);
document.querySelectorAll("[data-strip]").forEach((place) => {
  const row = data.rows.find((one) => one.pattern === place.dataset.strip);
  if (row) place.replaceWith(strip(row.prefill, "prefill"));
});

function drawCharts() {
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--ink").trim();
  const line = style.getPropertyValue("--line").trim();
  const places = [...document.querySelectorAll("[data-chart]")].filter((place) => data.charts[place.dataset.chart]);
  // All are shown before one is drawn: what is hidden has no width, and takes none from the others.
  places.forEach((place) => place.classList.add("drawn"));
  places.forEach((place) => {
    const figure = data.charts[place.dataset.chart];
    place.querySelector("h3").textContent = figure.layout.meta;
    const layout = structuredClone(figure.layout);
    Object.assign(layout, { paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", colorway: data.colours });
    layout.font = { color: ink };
    for (const name of ["xaxis", "yaxis", "yaxis2"]) {
      if (name === "yaxis2" && !layout.yaxis2) continue;
      layout[name] = { ...layout[name], gridcolor: line, zerolinecolor: line, linecolor: line };
    }
    Plotly.react(place.querySelector("div"), figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  });
}

filter();
drawCharts();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawCharts);
