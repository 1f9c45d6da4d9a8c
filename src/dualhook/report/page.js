"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const DEFINITIONS = {
  contribution: "contribution",
  abs_contribution: "|contribution|",
  weight: "attention weight",
  abs_weight: "|attention weight|",
};
const PLACE = Object.keys(DEFINITIONS);
const MOST_BARS = 12;
const MOST_CONFUSED = 15;
const ACROSS = { wide: 8, narrow: 4 };
const state = { query: 0, layer: "all", by: "contribution", sign: "any", count: "single" };

// Text goes in as text, never as markup.
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "line", "circle", "title"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return made;
}

function number(value, signed = false) {
  if (value === null) return "not known";
  const size = Math.abs(value);
  const tiny = size > 0 && size < 1e-3;
  const text = tiny ? size.toExponential(0) : size.toLocaleString("en", { maximumSignificantDigits: size < 1000 ? 3 : 4 });
  return (value < 0 ? "\u2212" : signed && value > 0 ? "+" : "") + text;
}

function percent(share) {
  if (share === null) return "an unknown share";
  const text = (100 * share).toFixed(share > 0.999 && share < 0.999999 ? 4 : 2);
  return `${text.replace(/\.?0+$/, "").replace("-", "\u2212")} %`;
}

function plural(count, thing) {
  return `${count.toLocaleString("en")} ${thing}${count === 1 ? "" : "s"}`;
}

const tone = (value) => (value >= 0 ? "raised" : "lowered");
const plain = () => state.by.replace("abs_", "");
const magnitude = () => state.by.startsWith("abs_");
const shownLayers = () => data.layers.map((_, n) => n).filter((n) => state.layer === "all" || state.layer === String(n));

function picture(index, alt) {
  const uri = data.pictures[index];
  return el("img", { src: uri, alt, class: uri.startsWith("data:image/png") ? "exact" : null });
}

// ---- choosing

function outcome(query) {
  return query.truth === null ? "" : query.truth === query.output ? "correct" : "wrong";
}

function pick(n, ...content) {
  return el("button", { type: "button", "data-query": n, "aria-pressed": "false", onclick: () => choose({ query: n }) }, ...content);
}

function buildQueries() {
  const nav = document.getElementById("queries");
  if (data.sequences.length) {
    nav.append(el("p", { class: "note" }, "Choose a token: what follows is about the one that the model puts after it."));
    data.sequences.forEach((tokens, sequence) => {
      const line = el("p", { class: "prompt" });
      tokens.forEach((token, position) => {
        const n = data.queries.findIndex((query) => query.sequence === sequence && query.position === position);
        const button = n < 0 ? token : pick(n, token);
        if (n >= 0) {
          button.className = "token";
          button.setAttribute("aria-label", `token ${position + 1}: ${token.trim() || "white space"}`);
        }
        line.append(button);
      });
      nav.append(line);
    });
    return;
  }
  const strip = el("div", { class: "strip" });
  data.queries.forEach((query, n) => {
    const judged = outcome(query);
    const button = pick(
      n,
      query.picture === null ? null : picture(query.picture, ""),
      el("span", {}, `${n + 1}. ${query.output}`),
      judged ? el("span", { class: judged === "wrong" ? "lowered" : "plain" }, judged) : null,
    );
    button.classList.add("pick");
    strip.append(button);
  });
  nav.append(strip);
}

function buildFilters() {
  const form = document.getElementById("filters");
  form.addEventListener("submit", (event) => event.preventDefault());
  const summed = data.top.some((layers) => layers.some((one) => one.summed !== null));
  const choices = {
    layer: ["Layer", [["all", "all"], ...data.layers.map((name, n) => [String(n), name])]],
    by: ["Ranked by", Object.entries(DEFINITIONS)],
    sign: ["Sign", [["any", "both"], ["positive", "positive only"], ["negative", "negative only"]]],
  };
  if (summed) choices.count = ["Count", [["single", "one training step"], ["summed", "all steps of a sample"]]];
  for (const [name, [label, options]] of Object.entries(choices)) {
    const select = el("select", { name, onchange: () => choose({ [name]: select.value }) });
    for (const [value, text] of options) select.append(el("option", { value }, text));
    form.append(el("label", {}, label, select));
  }
}

function choose(change) {
  Object.assign(state, change);
  for (const button of document.querySelectorAll("[data-query]")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.query) === state.query));
  }
  document.getElementById("detail").replaceChildren(...predictionOf(state.query));
  document.getElementById("overview").replaceChildren(...overview());
}

// ---- one prediction

function predictionOf(q) {
  const query = data.queries[q];
  const judged = outcome(query);
  const lines = [el("h2", {}, data.sequences.length ? `Predicts “${query.output.trim() || query.output}”` : `${q + 1}. Predicted: ${query.output}`)];
  if (query.truth !== null) {
    lines.push(el("p", { class: judged === "wrong" ? "lowered" : null }, `True class: ${query.truth} (${judged})`));
  }
  const chance = query.probability === null ? "" : `, probability ${number(query.probability)}`;
  lines.push(el("p", { class: "note" }, `Score (logit) ${number(query.score)}${chance}`));
  const image = query.picture === null ? null : picture(query.picture, `the image asked about, predicted ${query.output}`);
  return [el("div", { class: "query" }, image, el("div", {}, lines)), ...shownLayers().map((l) => layerOf(q, l)), estimateOf(q)].filter((part) => part !== null);
}

// An estimate, apart from the sums that add up; no filter changes it.
function estimateOf(q) {
  const found = data.influence;
  if (!found) return null;
  const ends = found.missing ? [el("p", { class: "note" }, `Not known here: ${found.missing}`)] : ["raised", "lowered"].map((way) => {
    const entries = found[way][q];
    const heading = el("h4", { class: way }, `${way === "raised" ? "Raised" : "Lowered"} the ${found.about} most`);
    if (!entries.length) return el("div", {}, heading, el("p", { class: "note" }, "None."));
    const most = Math.max(...entries.map((entry) => Math.abs(entry[2])));
    const items = entries.map(([sample, position, value]) => data.kind === "images"
      ? figureOf(sample, value, [rowOf(sample)])
      : passageOf(sample, position, value, most, []));
    return el("div", { class: "list" }, heading, data.kind === "images" ? gridOf(items) : el("ol", { class: "passages" }, items));
  });
  return el(
    "article",
    { class: "estimate", "aria-label": "estimated influence" },
    el("header", {}, el("h3", {}, "Estimated influence: what would have changed this prediction"),
      el("p", { class: "receipt" }, "An estimate, unlike the sums above. ", el("span", { class: "note" }, `Method ${found.meaning}.`))),
    ends,
  );
}

function layerOf(q, l) {
  const title = `layer ${data.layers[l]}`;
  const charts = data.totals.map((totals) => barsOf(totals, q, l)).filter((chart) => chart !== null);
  return el(
    "article",
    { class: "layer", "aria-label": title },
    el("header", {}, el("h3", {}, title), receiptOf(q, l)),
    el("div", { class: "columns" }, el("div", {}, listOf(q, l), stepsOf(q, l)), el("div", {}, charts)),
  );
}

function receiptOf(q, l) {
  const [explained, cancellation] = data.receipt[q][l];
  const parts = data.parts[q][l];
  const whole = explained !== null && explained > 0.99;
  const cancels = cancellation !== null && parts.patterns !== null
    ? ` Their contributions add up to ${number(parts.patterns, true)}, out of ${number(cancellation * Math.abs(parts.patterns))} in absolute terms: cancellation ${number(cancellation)}, ${cancellation > 20 ? "so a single one says little by itself." : "so single ones carry weight."}`
    : "";
  const rest = Object.entries(parts).filter(([name]) => name !== "patterns").map(([name, value]) => `${name} ${number(value, true)}`);
  return el(
    "p",
    { class: "receipt" },
    whole ? "It adds up: " : "It does not quite add up: ",
    `the recorded patterns explain ${percent(explained)} of what training did to this output.${cancels} `,
    el("span", { class: "note" }, `Beside them along this score: ${rest.join(", ")}.`),
  );
}

function listed(q, l) {
  const found = data.top[q][l][state.count];
  if (!found) return [];
  const at = PLACE.indexOf(plain()) === 0 ? 4 : 3;
  const name = state.sign === "negative" && !magnitude() ? `${state.by}_low` : state.by;
  const kept = (value) => state.sign === "any" || (state.sign === "positive" ? value > 0 : value < 0);
  return found.lists[name].map((n) => found.entries[n]).filter((entry) => kept(entry[at]));
}

function listOf(q, l) {
  const entries = listed(q, l);
  const kind = data.kind === "images" ? "images" : data.kind === "text" ? "passages" : "samples";
  const heading = el("h4", {}, `Training ${kind} by ${DEFINITIONS[state.by]}, ${state.count === "single" ? "in one step" : "over all steps"}; coloured: contribution`);
  if (!entries.length) return el("div", {}, heading, el("p", { class: "note" }, "None of this sign among those listed."));
  return el("div", { class: "list" }, heading, data.kind === "images" ? thumbs(entries) : passages(entries));
}

function when(step) {
  return step === null ? "all steps" : `step ${step.toLocaleString("en")}`;
}

function rowOf(sample) {
  return sample < 0 ? "sample not known" : `row ${sample}`;
}

function thumbs(entries) {
  return gridOf(entries.map(([sample, , step, weight, contribution]) =>
    figureOf(sample, contribution, [`weight ${number(weight)}`, when(step), rowOf(sample)])));
}

// As many side by side as fill every line, or nearly.
function gridOf(items) {
  const across = (most) => Math.ceil(items.length / Math.ceil(items.length / most));
  return el("ul", { class: "thumbs", style: `--wide: ${across(ACROSS.wide)}; --narrow: ${across(ACROSS.narrow)}` }, items);
}

function figureOf(sample, value, notes) {
  const { picture: index, group } = data.samples[sample];
  const image = index === null ? null : picture(index, `training image ${sample}${group === null ? "" : `, ${group}`}`);
  return el("li", {}, el("figure", { class: tone(value) }, image, el(
    "figcaption",
    {},
    el("b", {}, group === null ? `image ${sample}` : group),
    el("span", { class: tone(value) }, number(value, true)),
    notes.map((note) => el("small", {}, note)),
  )));
}

function passages(entries) {
  const most = Math.max(...entries.map((entry) => Math.abs(entry[4] ?? 0))) || 1;
  return el("ol", { class: "passages" }, entries.map(([sample, position, step, weight, contribution]) =>
    passageOf(sample, position, contribution, most, [`weight ${number(weight)}`, when(step)])));
}

function passageOf(sample, position, value, most, notes) {
  const shade = (0.04 + (0.3 * Math.abs(value ?? 0)) / most).toFixed(3);
  const group = sample in data.samples ? data.samples[sample].group : null;
  const where = position === null ? rowOf(sample) : `${rowOf(sample)}, position ${position}`;
  return el(
    "li",
    { style: `background: rgb(var(--${tone(value)}-shade) / ${shade})` },
    el("span", { class: tone(value) }, number(value, true)),
    el("span", {}, marked(data.passages[`${sample}:${position}`] ?? where)),
    el("small", {}, [...notes, where, ...(group === null ? [] : [group])].join(", ")),
  );
}

function marked(text) {
  const start = text.indexOf("«");
  const stop = text.indexOf("»", start);
  if (start < 0 || stop < 0) return [text];
  return [text.slice(0, start), el("mark", {}, text.slice(start + 1, stop)), text.slice(stop + 1)];
}

function barsOf(totals, q, l) {
  const at = PLACE.indexOf(state.by);
  let rows = totals.values[q][l].map((values, n) => ({ name: totals.groups[n], value: values[at] ?? 0, n }));
  const left = rows.length - MOST_BARS;
  if (left > 0) {
    rows.sort((a, b) => Math.abs(b.value) - Math.abs(a.value));
    rows = rows.slice(0, MOST_BARS);
  }
  rows = rows.filter(({ name, value }) => name !== "unknown" || value !== 0);
  if (!rows.length) return null;
  const low = Math.min(0, ...rows.map((row) => row.value));
  const width = Math.max(0, ...rows.map((row) => row.value)) - low || 1;
  const body = rows.map(({ name, value }) => {
    const start = (100 * (Math.min(0, value) - low)) / width;
    const bar = el("i", { class: magnitude() ? "plain" : tone(value), style: `left: ${start}%; width: ${(100 * Math.abs(value)) / width}%` });
    return el(
      "tr",
      { class: name === data.queries[q].output ? "asked" : null },
      el("th", { scope: "row", title: name }, name),
      el("td", {}, el("span", { class: "track", "aria-hidden": "true" }, bar)),
      el("td", { class: "value" }, number(value, !magnitude())),
    );
  });
  const caption = `Total ${DEFINITIONS[state.by]} per ${totals.column}`;
  const more = left > 0 ? el("tfoot", {}, el("tr", {}, el("td", { colspan: 3, class: "note" }, `and ${left} more`))) : null;
  return el("table", { class: "bars" }, el("caption", {}, caption), el("tbody", {}, body), more);
}

function stepsOf(q, l) {
  const at = PLACE.indexOf(state.by);
  const values = data.steps.values[q][l].map((one) => one[at] ?? 0);
  const { first, last } = data.steps;
  const [width, height] = [600, 90];
  const high = Math.max(0, ...values);
  const low = Math.min(0, ...values);
  const scale = height / (high - low || 1);
  const zero = high * scale;
  const pitch = width / values.length;
  const largest = values.reduce((best, value, n) => (Math.abs(value) > Math.abs(values[best]) ? n : best), 0);
  const what = `${DEFINITIONS[state.by]} over the training steps ${first[0]} to ${last.at(-1)}; largest in steps ${first[largest]} to ${last[largest]}`;
  const drawn = values.map((value, n) => el(
    "rect",
    {
      x: n * pitch, y: Math.min(zero, zero - value * scale), width: Math.max(1, pitch - 1), height: Math.abs(value) * scale,
      class: magnitude() ? "plain" : tone(value),
    },
    el("title", {}, `steps ${first[n]} to ${last[n]}: ${number(value, !magnitude())}`),
  ));
  const span = last.at(-1) + 1 - first[0];
  const dots = state.count !== "single" ? [] : listed(q, l).map((entry) => el("circle", {
    cx: (width * (entry[2] + 0.5 - first[0])) / span, cy: height + 8, r: 2.5, class: tone(entry[4]),
  }, el("title", {}, `a listed pattern, step ${entry[2]}`)));
  const chart = el(
    "svg",
    { viewBox: `0 0 ${width} ${height + 12}`, role: "img", "aria-label": `Chart: total ${what}.` },
    drawn,
    el("line", { class: "zero", x1: 0, x2: width, y1: zero, y2: zero }),
    dots,
  );
  return el("div", {},
    el("h4", {}, `Total ${DEFINITIONS[state.by]} by training step${dots.length ? "; dots: the patterns listed" : ""}`),
    chart,
    el("div", { class: "axis note" },
      el("span", {}, `step ${first[0].toLocaleString("en")}`),
      el("span", {}, `tallest bar ${number(values[largest], !magnitude())} in ${plural(last[largest] + 1 - first[largest], "step")}`),
      el("span", {}, `step ${last.at(-1).toLocaleString("en")}`)));
}

// ---- all predictions

function overview() {
  const votes = data.votes && data.votes[state.by];
  if (!votes) return [];
  const { column, groups } = data.totals[0];
  const named = (q, l) => groups[votes[q][l]];
  const known = data.queries.some((query) => query.truth !== null);
  const kinds = known ? ["all", "correct", "wrong"] : ["all"];
  const rows = data.layers.map((layer, l) => el("tr", {}, el("th", { scope: "row" }, layer), kinds.flatMap((kind) => {
    const among = data.queries.map((query, q) => [query, q]).filter(([query]) => kind === "all" || outcome(query) === kind);
    const count = (of) => `${among.filter(([query, q]) => query[of] === named(q, l)).length} of ${among.length}`;
    return [el("td", {}, count("output")), known ? el("td", {}, count("truth")) : null];
  })));
  const heads = kinds.map((kind) => el("th", { scope: "colgroup", colspan: known ? 2 : 1 }, `${kind} predictions`));
  const subs = kinds.flatMap(() => [el("th", { scope: "col" }, "output"), known ? el("th", { scope: "col" }, "truth") : null]);
  const table = el(
    "table",
    { class: "grid" },
    el("caption", {}, `How often the vote of ${column} by ${DEFINITIONS[state.by]} equals …`),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "layer"), heads), el("tr", {}, el("td", {}), subs)),
    el("tbody", {}, rows),
  );
  return [
    el("h2", { id: "overview-title" }, plural(data.queries.length, "prediction") + " together"),
    el("p", { class: "note" }, `Which ${column} has the largest total? The last layer’s vote is closest to what the model says; it is a different answer by each definition.`),
    el("div", { class: "scroll" }, table),
    el("div", { class: "side-by-side" }, shownLayers().map((l) => confusion(l, named))),
  ];
}

function confusion(l, named) {
  const outputs = data.queries.map((query) => query.output);
  const names = [...new Set([...outputs, ...outputs.map((_, q) => named(q, l))])];
  if (names.length > MOST_CONFUSED) return el("p", { class: "note" }, `Votes of ${names.length} groups are too many for a table.`);
  const order = data.totals[0].groups.filter((name) => names.includes(name));
  const all = [...order, ...names.filter((name) => !order.includes(name))];
  const rows = all.map((output) => el("tr", {}, el("th", { scope: "row" }, output), all.map((vote) => {
    const count = outputs.filter((name, q) => name === output && named(q, l) === vote).length;
    return el("td", { class: output === vote ? "same" : null }, count ? String(count) : "·");
  })));
  return el("div", { class: "scroll" }, el(
    "table",
    { class: "grid" },
    el("caption", {}, `Vote of layer ${data.layers[l]} (across) against the model’s output (down)`),
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "output \\ vote"), all.map((name) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, rows),
  ));
}

function about() {
  const { facts, layers, queries } = data;
  const counts = [...new Set(facts.patterns)];
  const patterns = counts.length === 1 ? `${counts[0].toLocaleString("en")} patterns in each` : `${facts.patterns.reduce((a, b) => a + b, 0).toLocaleString("en")} patterns`;
  return [
    `${plural(queries.length, "prediction")}, ${plural(layers.length, "layer")}, ${patterns}`,
    `${plural(facts.steps, "step")} of ${facts.optimizer || "training"} on ${plural(facts.samples, "sample")}`,
    `memory ${facts.memory}${facts.preview ? "; a preview, not exact" : ""}`,
  ].join(" · ");
}

document.getElementById("facts").textContent = about();
buildQueries();
buildFilters();
choose({});
// On paper every prediction is shown.
addEventListener("beforeprint", () => document.getElementById("detail").replaceChildren(...data.queries.flatMap((_, q) => predictionOf(q))));
addEventListener("afterprint", () => choose({}));
