// A text under a model's eyes: tokens coloured by what a condition does to them, the damage curve,
// the experts before and after. It draws what `model` (get, set, on, off, save_changes) holds: in a
// notebook a kernel's traits, in a page the answers that lie in it.
//
//   from the kernel  about, passage, run, curve, card, message, answered
//   to the kernel    text, perturbation, strength, where, expert, wanted, asked
//
// Token i is predicted at position i, and read by experts at position i + 1. Text is only ever set
// as textContent.

const MODES = {
  damage: "damage",
  before: "experts before",
  after: "experts after",
  margin: "margin",
};
const HUES = 8; // colours of experts in explorer.css; from one round of them to the next paler
const SCALES = [0.1, 0.25, 0.5, 1, 2, 4, 8, 16]; // where colours end

// Elements ----------------------------------------------------------------------------------------

const SVG = new Set(["svg", "g", "path", "circle", "rect", "line", "text", "title"]);

/** An element with attributes (functions are listeners; false leaves one out) and children. */
function make(tag, attributes = {}, ...children) {
  const node = SVG.has(tag)
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter((child) => child != null));
  return node;
}

/** A labelled field. */
const field = (name, control, ...more) =>
  make("label", { class: "field" }, make("span", { class: "name" }, name), control, ...more);

/** A select; `options` maps values to what people read. */
function select(options, onchange) {
  const choices = Object.entries(options).map(([value, text]) => make("option", { value }, text));
  return make("select", { change: (event) => onchange(event.target.value) }, choices);
}

const panel = (name, title, ...children) =>
  make("section", { class: `panel ${name}` }, make("h2", {}, title), ...children);

// Numbers -----------------------------------------------------------------------------------------

/** Numbers that Python packed (`wire.packed`). */
function unpack({ base64, bytes, signed, step }) {
  const raw = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const kinds = signed
    ? { 1: Int8Array, 2: Int16Array, 4: Int32Array }
    : { 1: Uint8Array, 2: Uint16Array, 4: Uint32Array };
  return Float32Array.from(new kinds[bytes](raw.buffer), (steps) => steps * step);
}

const fixed = (x, digits = 3) => x.toFixed(digits).replace("-", "−");
const signed = (x, digits = 3) => (x >= 0 ? "+" : "") + fixed(x, digits);
const percent = (x) => `${(100 * x).toFixed(1)} %`;
const plain = (x) => String(x).replace("-", "−");

/** The number of a round scale below which this share of the values lies. */
function roundScale(values, share) {
  const sorted = Float32Array.from(values, Math.abs).sort();
  const size = sorted[Math.floor(share * (sorted.length - 1))] ?? 0;
  return SCALES.find((scale) => size <= scale) ?? SCALES.at(-1);
}

/** Four or so round numbers from low to high. */
function ticks(low, high) {
  const rough = (high - low) / 4;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find((times) => times * power >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high + 1e-9; n++) found.push(+(n * step).toFixed(6));
  return found;
}

// What was measured -------------------------------------------------------------------------------

/** A run with its numbers unpacked; a site that it leaves out decides as in the clean one. */
function unpackRun(run, clean) {
  const slots = { ...clean?.slots };
  for (const [site, { k, ids, weights }] of Object.entries(run.slots)) {
    slots[site] = { k, ids: unpack(ids), weights: unpack(weights) };
  }
  return { ...run, nll: unpack(run.nll), slots };
}

/** [expert, weight] of the slots that a position uses, the heaviest first. */
function expertsAt({ k, ids, weights }, position) {
  const found = [];
  for (let slot = position * k; slot < (position + 1) * k; slot++) {
    if (weights[slot] > 0) found.push([ids[slot], weights[slot]]);
  }
  return found;
}

const setOf = (slots, position) =>
  String(expertsAt(slots, position).map(([expert]) => expert).sort((a, b) => a - b));

/** Each expert's share of the used slots. */
function loads(slots, experts) {
  const counts = new Float64Array(experts);
  slots.weights.forEach((weight, slot) => (counts[slots.ids[slot]] += weight > 0));
  const total = counts.reduce((a, b) => a + b, 0) || 1;
  return counts.map((count) => count / total);
}

/** rows x columns: the share of positions that use expert a of one site and b of the other. */
function jointUse(first, second, rows, columns) {
  const share = Array.from({ length: rows }, () => new Float64Array(columns));
  const positions = first.ids.length / first.k;
  for (let p = 0; p < positions; p++) {
    for (const [a] of expertsAt(first, p)) {
      for (const [b] of expertsAt(second, p)) share[a][b] += 1 / positions;
    }
  }
  return share;
}

/** What the panels draw, from the model; unpacked once for each answer. */
class State {
  constructor(model) {
    this.model = model;
    this.mode = "damage";
    this.site = 0;
    this.token = null; // under the pointer or the cursor
    this.lit = null; // an expert whose tokens stand out
  }

  read() {
    const get = (name) => this.model.get(name);
    this.about = get("about");
    if (this.rawPassage !== get("passage")) {
      this.rawPassage = get("passage");
      this.clean = unpackRun(this.rawPassage);
      this.rawRun = undefined;
      this.token = null;
    }
    if (this.rawRun !== get("run")) {
      this.rawRun = get("run");
      const own = this.rawRun?.nll ? unpackRun(this.rawRun, this.clean) : null;
      this.run = own;
      this.damage = own?.nll.map((nats, i) => nats - this.clean.nll[i]);
    }
    const margin = this.clean.margins[this.siteName];
    if (this.rawMargin !== margin) {
      this.rawMargin = margin;
      this.margin = unpack(margin);
    }
    const asked = ({ name }) => name === get("perturbation");
    this.control = this.about.controls.find(asked) ?? this.about.controls[0];
  }

  get siteName() {
    return this.about.sites[this.site].name;
  }

  get before() {
    return this.clean.slots[this.siteName];
  }

  get after() {
    return (this.run ?? this.clean).slots[this.siteName];
  }

  /** Set traits and have them answered. */
  ask(traits) {
    for (const [name, value] of Object.entries(traits)) this.model.set(name, value);
    this.model.set("asked", this.model.get("asked") + 1);
    this.model.save_changes();
  }
}

// Characters --------------------------------------------------------------------------------------

const INVISIBLE = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]/g;

/** With pictures or codes for characters that cannot be seen, or would turn the others around. */
function visible(text) {
  return text.replace(INVISIBLE, (character) => {
    const code = character.charCodeAt(0);
    if (code < 0x20) return String.fromCharCode(0x2400 + code);
    if (code === 0x7f) return "\u2421";
    return `\u27e8${code.toString(16).toUpperCase().padStart(4, "0")}\u27e9`;
  });
}

/** A token in words: what is blank is named. */
const quoted = (text) =>
  text === "" ? "(goes on with the character before)" : `“${visible(text).replace(/\n/g, "⏎").replace(/\t/g, "⇥")}”`;

const blank = (text) =>
  ({ " ": "space", "\n": "newline", "\t": "tab", "": "rest" })[text] ?? "";

// The text ----------------------------------------------------------------------------------------

let views = 0;

/** The tokens: one tab stop, arrows move through them; `describe` tells of one. */
function textPanel(state, redraw) {
  const id = `tokens-${views++}`;
  const tooltip = make("div", { class: "tooltip", role: "status", hidden: "" });
  const tokens = make("div", {
    class: "tokens",
    role: "listbox",
    tabindex: "0",
    "aria-label": "text, token by token; arrow keys move",
    keydown: (event) => {
      const last = tokens.children.length - 1;
      const now = state.token ?? -1;
      const to = { ArrowRight: now + 1, ArrowLeft: now - 1, Home: 0, End: last, ArrowDown: now + 40, ArrowUp: now - 40 }[event.key];
      if (event.key === "Escape") show(null);
      if (to === undefined) return;
      event.preventDefault();
      show(Math.max(0, Math.min(last, to)), true);
    },
    focus: () => show(state.token ?? 0),
    blur: () => show(null),
    pointerover: (event) => event.target.dataset.i && show(+event.target.dataset.i),
    pointerleave: () => show(null),
  });
  const box = make("div", { class: "reader" }, tokens, tooltip);
  let shown;

  function show(token, scroll = false) {
    tokens.children[state.token]?.setAttribute("aria-selected", "false");
    state.token = token;
    tooltip.hidden = token === null;
    if (token === null) return tokens.removeAttribute("aria-activedescendant");
    const span = tokens.children[token];
    span.setAttribute("aria-selected", "true");
    tokens.setAttribute("aria-activedescendant", span.id);
    tooltip.replaceChildren(...describe(state, token));
    if (scroll) span.scrollIntoView({ block: "nearest" });
    const [outer, own] = [box.getBoundingClientRect(), span.getClientRects()[0]];
    if (!own) return;
    const room = outer.width - tooltip.offsetWidth;
    tooltip.style.left = `${Math.max(0, Math.min(room, own.left - outer.left))}px`;
    tooltip.style.top = `${own.bottom - outer.top + 6}px`;
  }

  function draw() {
    if (shown !== state.rawPassage) {
      shown = state.rawPassage;
      tokens.replaceChildren(
        ...state.clean.tokens.map((text, i) =>
          make("span", { id: `${id}-${i}`, role: "option", "aria-selected": "false", "data-i": i, "data-blank": blank(text) }, visible(text)),
        ),
      );
    }
    paint(state, tokens.children);
    if (state.token !== null) tooltip.replaceChildren(...describe(state, state.token));
  }
  return { node: box, draw };
}

/** Colours and marks of all tokens. Of a colour only its depth is set here; see explorer.css. */
function paint(state, spans) {
  const { mode, before, after } = state;
  const slots = mode === "before" ? before : after;
  const scale = scaleOf(state);
  for (let i = 0; i < spans.length; i++) {
    const [span, read] = [spans[i], i + 1 < spans.length];
    const experts = read ? expertsAt(slots, i + 1) : [];
    let [hue, depth] = ["none", 0];
    if (mode === "damage" && state.run) {
      hue = state.damage[i] > 0 ? "hurt" : "helped";
      depth = Math.min(1, Math.abs(state.damage[i]) / scale);
    } else if (mode === "margin" && read) {
      [hue, depth] = ["margin", 1 - Math.min(1, state.margin[i + 1] / scale)];
    } else if (mode !== "damage" && experts.length) {
      [hue, depth] = expertLook(experts[0][0]);
    }
    span.dataset.hue = hue;
    span.style.setProperty("--depth", depth.toFixed(2));
    const routed = read && state.run && (mode === "before" || mode === "after");
    span.classList.toggle("changed", routed && setOf(before, i + 1) !== setOf(after, i + 1));
    span.classList.toggle("dim", state.lit !== null && !experts.some(([expert]) => expert === state.lit));
  }
}

const expertLook = (expert) => [expert % HUES, [0.85, 0.5, 0.28][Math.floor(expert / HUES) % 3]];

function scaleOf(state) {
  if (state.mode === "damage") return state.run ? roundScale(state.damage, 0.97) : 1;
  return state.mode === "margin" ? roundScale(state.margin, 0.9) : null;
}

/** What a token's tooltip says. */
function describe(state, token) {
  const { clean, run, damage } = state;
  const row = (name, ...values) => make("div", {}, make("b", {}, name), " ", ...values);
  const list = (slots) =>
    expertsAt(slots, token + 1).map(([e, weight]) => `${e} (${weight.toFixed(2)})`).join(", ") || "none";
  const loss = run
    ? `${fixed(clean.nll[token])} → ${fixed(run.nll[token])} nats (${signed(damage[token])})`
    : `${fixed(clean.nll[token])} nats`;
  const rows = [row(quoted(clean.tokens[token]), `token ${token + 1}`), row("loss", loss)];
  if (token + 1 === clean.tokens.length) return [...rows, row("read by", "nobody: it is the last")];
  const [before, after] = [list(state.before), list(state.after)];
  const name = state.about.sites.length > 1 ? `experts, ${state.siteName}` : "experts";
  rows.push(row(name, run && after !== before ? `${before} → ${after}` : before));
  return [...rows, row("margin", fixed(state.margin[token + 1]))];
}

/** What colours mean, with numbers. */
function legend(state) {
  const scale = scaleOf(state);
  const ramp = (hues, low, middle, high) => [
    make("span", {}, low),
    make("span", { class: `ramp ${hues}` }, middle),
    make("span", {}, high),
  ];
  if (state.mode === "damage") return ramp("diverging", `−${scale}`, "0", `+${scale} nats`);
  if (state.mode === "margin") return ramp("sequential", "0: about to change", "", `${scale}`);
  const chips = Array.from({ length: Math.min(24, state.about.sites[state.site].experts) }, (_, e) => {
    const chip = make("span", { class: "chip" }, String(e));
    const [hue, depth] = expertLook(e);
    chip.dataset.hue = hue;
    chip.style.setProperty("--depth", depth);
    return chip;
  });
  return [make("span", { class: "chips" }, chips), make("span", {}, "first choice; underlined: another set than before")];
}

// The other panels --------------------------------------------------------------------------------

/** Nats per token over the strengths of the perturbation. */
function curvePanel(state) {
  const [width, height, left, bottom, top, right] = [380, 210, 46, 38, 12, 14];
  const box = make("div", {});
  const progress = make("p", { class: "note" });

  function draw() {
    const { control, model, clean } = state;
    const nats = model.get("curve").nats;
    const known = nats.filter(Number.isFinite);
    const strengths = control.strengths;
    const [x0, x1] = [Math.min(...strengths), Math.max(...strengths)];
    let [y0, y1] = [Math.min(clean.nats, ...known), Math.max(clean.nats, ...known)];
    [y0, y1] = [y0 - 0.06 * (y1 - y0 || 1), y1 + 0.06 * (y1 - y0 || 1)];
    const x = (s) => (x1 > x0 ? left + ((s - x0) / (x1 - x0)) * (width - left - right) : width / 2);
    const y = (v) => top + ((y1 - v) / (y1 - y0)) * (height - top - bottom);
    const at = strengths.map((s, i) => [x(s), nats[i]]).filter(([, v]) => Number.isFinite(v));
    const axis = ticks(y0, y1).map((v) => [
      make("line", { class: "grid", x1: left, x2: width - right, y1: y(v), y2: y(v) }),
      make("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, plain(v)),
    ]);
    const named = control.parameter === null ? { [x0]: "off", [x1]: "on" } : null;
    let edge = -Infinity; // of the number before, so that none stand on each other
    const numbers = strengths.map((s) => {
      const text = named && x1 > x0 ? named[s] : plain(s);
      if (x(s) - edge < 4 + 4 * text.length) return null;
      edge = x(s) + 4 * text.length;
      return make("text", { x: x(s), y: height - bottom + 16, "text-anchor": "middle" }, text);
    });
    const points = strengths.map((s, i) =>
      Number.isFinite(nats[i])
        ? make("circle", { class: s === model.get("strength") ? "point now" : "point", cx: x(s), cy: y(nats[i]), r: s === model.get("strength") ? 5.5 : 3.5, click: () => state.ask({ strength: s }) },
            make("title", {}, `${control.parameter ?? control.name} ${plain(s)}: ${fixed(nats[i])}`))
        : null,
    );
    const path = at.map(([px, v], i) => `${i ? "L" : "M"}${px.toFixed(1)} ${y(v).toFixed(1)}`).join("");
    const said = at.length ? `${fixed(Math.min(...known))} to ${fixed(Math.max(...known))}` : "";
    box.replaceChildren(
      make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Damage curve of ${control.name}: ${said} nats per token; clean ${fixed(clean.nats)}` },
        axis.flat(),
        make("line", { class: "clean", x1: left, x2: width - right, y1: y(clean.nats), y2: y(clean.nats) }),
        make("text", { class: "clean", x: width - right, y: y(clean.nats) - 5, "text-anchor": "end" }, "clean"),
        make("path", { class: "curve", d: path }),
        points,
        numbers,
        make("text", { class: "title", x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, control.parameter ?? ""),
      ),
    );
    const missing = nats.filter((v) => v === null).length;
    progress.textContent = missing && state.about.live ? `${nats.length - missing} of ${nats.length} points` : "";
  }
  return { node: panel("damage", "Damage curve, nats per token", box, progress), draw };
}

/** Each expert's share of the slots, clean and now; a click asks for its card. */
function expertsPanel(state, redraw) {
  const rows = make("div", { class: "rows" });
  const light = (expert) => () => {
    state.lit = expert;
    redraw();
  };
  let buttons = [];

  function draw() {
    const { experts } = state.about.sites[state.site];
    const [before, after] = [loads(state.before, experts), loads(state.after, experts)];
    const most = Math.max(...before, ...after, 1e-9);
    if (buttons.length !== experts) {
      buttons = Array.from({ length: experts }, (_, e) =>
        make("button", { type: "button", click: () => state.ask({ expert: [state.site, e] }), pointerenter: light(e), pointerleave: light(null), focus: light(e), blur: light(null) },
          make("span", { class: "id" }, String(e)),
          make("span", { class: "bars" }, make("i", { class: "before" }), make("i", { class: "after" })),
          make("span", { class: "shares" }),
        ),
      );
      rows.replaceChildren(...buttons);
    }
    const picked = state.model.get("expert");
    buttons.forEach((button, e) => {
      const [, bars, shares] = button.children;
      bars.children[0].style.width = `${(100 * before[e]) / most}%`;
      bars.children[1].style.width = `${(100 * after[e]) / most}%`;
      shares.textContent = state.run ? `${percent(before[e])} → ${percent(after[e])}` : percent(before[e]);
      button.setAttribute("aria-label", `expert ${e}: ${shares.textContent} of the slots`);
      button.setAttribute("aria-pressed", String(picked[0] === state.site && picked[1] === e));
    });
  }
  const key = make("p", { class: "key note" }, make("i", { class: "before" }), "clean ", make("i", { class: "after" }), "perturbed; a click opens an expert's card");
  return { node: panel("experts", "Experts: share of the slots", key, rows), draw };
}

/** Of a Cartesian layer: how often A's and B's experts are used together, before and after. */
function gridPanel(state) {
  const maps = make("div", { class: "maps" });
  const node = panel("grid", "A × B: used together", maps);

  function heat(title, share, most, cell) {
    const [rows, columns] = [share.length, share[0].length];
    const rects = share.flatMap((line, a) =>
      Array.from(line, (v, b) =>
        make("rect", { class: "cell", x: 22 + b * cell, y: 6 + a * cell, width: cell - 0.6, height: cell - 0.6, "fill-opacity": Math.sqrt(v / most).toFixed(3) }, make("title", {}, `A ${a}, B ${b}: ${percent(v)}`)),
      ),
    );
    const [w, h] = [columns * cell, rows * cell];
    return make("figure", {},
      make("svg", { viewBox: `0 0 ${w + 26} ${h + 26}`, role: "img", "aria-label": `${title}: share of tokens by expert of A (rows) and of B (columns), at most ${percent(Math.max(...share.flatMap((r) => [...r])))}` },
        make("rect", { class: "frame", x: 22, y: 6, width: w, height: h }),
        rects,
        make("text", { x: 14, y: 6 + h / 2, "text-anchor": "end" }, "A"),
        make("text", { x: 22 + w / 2, y: h + 20, "text-anchor": "middle" }, "B")),
      make("figcaption", {}, title));
  }

  function draw() {
    const { layer } = state.about.sites[state.site];
    const pair = state.about.sites.filter((site) => site.layer === layer).slice(0, 2);
    node.hidden = pair.length < 2;
    if (node.hidden) return;
    const [A, B] = pair;
    const use = (run) => jointUse(run.slots[A.name], run.slots[B.name], A.experts, B.experts);
    const found = { before: use(state.clean), ...(state.run && { after: use(state.run) }) };
    const most = Math.max(...Object.values(found).flatMap((share) => share.map((line) => Math.max(...line))), 1e-9);
    const cell = Math.max(3, Math.min(12, 200 / Math.max(A.experts, B.experts)));
    maps.replaceChildren(...Object.entries(found).map(([title, share]) => heat(title, share, most, cell)));
    node.firstChild.textContent = `A × B of layer ${layer}: used together, up to ${percent(most)} of tokens`;
  }
  return { node, draw };
}

/** What is known of the expert that was clicked. */
function cardPanel(state) {
  const node = make("section", { class: "panel card", "aria-live": "polite" });
  let shown;

  function draw() {
    const card = state.model.get("card");
    node.hidden = !card.site;
    if (shown === card || !card.site) return;
    shown = card;
    const facts = [
      ["load", `${percent(card.load)} of the slots, at a mean weight of ${card.weight.toFixed(2)}`],
      ["when dropped", `${signed(card.damage, 4)} nats per token`],
    ];
    const contexts = card.contexts.map(({ before, token, after, weight }) =>
      make("li", {}, make("bdi", {}, visible(before)), make("mark", {}, visible(token).replace(/[\n ]/g, "␣")), make("bdi", {}, visible(after)), make("small", {}, weight.toFixed(2))));
    const meters = card.affinity.map(({ name, share, tokens }) => {
      const bar = make("i", { class: "after" });
      bar.style.width = `${100 * share}%`;
      return make("li", {}, make("span", {}, name), make("span", { class: "bars" }, bar), make("small", {}, `${percent(share)} of ${tokens}`));
    });
    const nearest = card.nearest.map(({ expert, cka, null: chance }) =>
      make("li", {}, make("button", { type: "button", click: () => state.ask({ expert: [sites().indexOf(card.site), expert] }) }, `expert ${expert}`),
        make("small", {}, `${cka.toFixed(2)} (null ${chance === null ? "–" : chance.toFixed(2)})`)));
    const list = (title, name, items) => (items.length ? [make("h3", {}, title), make("ul", { class: name }, items)] : []);
    node.replaceChildren(
      make("h2", {}, `Expert ${card.expert}, ${card.site}`),
      make("button", { type: "button", class: "close", "aria-label": "close the card", click: () => state.ask({ expert: [] }) }, "×"),
      make("dl", {}, facts.flatMap(([name, value]) => [make("dt", {}, name), make("dd", {}, value)])),
      ...list("Its heaviest tokens", "contexts", contexts),
      ...list(`Share of tokens that it reads, by ${card.by}`, "affinity", meters),
      ...list("Nearest by outputs (CKA)", "nearest", nearest),
      make("p", { class: "note" }, `From ${card.num_tokens} tokens of ${card.num_documents === 1 ? "one text" : `${card.num_documents} documents`}: no interval.`),
    );
  }
  const sites = () => state.about.sites.map(({ name }) => name);
  return { node, draw };
}

/** Perturbation, strength, sites; in a notebook another text. */
function controlsPanel(state) {
  const { model } = state;
  const names = Object.fromEntries(state.about.controls.map(({ name }) => [name, name]));
  const perturbation = select(names, (name) => {
    const { start } = state.about.controls.find((control) => control.name === name);
    state.ask({ perturbation: name, strength: start });
  });
  const slider = make("input", { type: "range", min: 0, step: 1, input: () => state.ask({ strength: state.control.strengths[slider.value] }) });
  const value = make("output", {});
  const sliderField = field("", slider, value);
  const places = select(Object.fromEntries(state.about.places.map((p) => [p, p])), (where) => state.ask({ where }));
  const about = make("p", { class: "note" });
  const text = make("textarea", { rows: 6, spellcheck: "false", "aria-label": "text to read" });
  const read = () => state.ask({ text: text.value });
  text.addEventListener("keydown", (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && read());
  // JupyterLab has keys of its own.
  text.dataset.lmSuppressShortcuts = "true";
  const other = make("details", {}, make("summary", {}, "Another text"), text, make("button", { type: "button", click: read }, "Read it"));
  const node = make("div", { class: "controls" }, field("perturbation", perturbation), sliderField, field("at", places), about, state.about.live ? other : null);
  let given;

  function draw() {
    const { control } = state;
    perturbation.value = control.name;
    places.value = model.get("where");
    slider.max = control.strengths.length - 1;
    const distances = control.strengths.map((s) => Math.abs(s - model.get("strength")));
    slider.value = distances.indexOf(Math.min(...distances));
    const words = control.parameter === null ? (model.get("strength") ? "on" : "off") : plain(model.get("strength"));
    value.textContent = words;
    slider.setAttribute("aria-valuetext", words);
    slider.disabled = control.strengths.length < 2;
    sliderField.firstChild.textContent = control.parameter ?? "strength";
    about.textContent = control.about;
    if (given !== state.clean.text) text.value = given = state.clean.text;
  }
  return { node, draw };
}

/** How the text is coloured, at which site. */
function modePanel(state, redraw) {
  const group = `mode-${views++}`;
  const radios = Object.entries(MODES).map(([mode, name]) =>
    make("label", {}, make("input", { type: "radio", name: group, value: mode, checked: mode === state.mode && "", change: () => ((state.mode = mode), redraw()) }), make("span", {}, name)));
  const site = select(Object.fromEntries(state.about.sites.map(({ name }, i) => [i, name])), (i) => ((state.site = +i), redraw()));
  const key = make("div", { class: "legend" });
  const node = make("div", { class: "modes" }, make("fieldset", {}, make("legend", {}, "colour"), radios), field("site", site), key);
  const draw = () => {
    site.value = state.site;
    key.replaceChildren(...legend(state));
  };
  return { node, draw };
}

/** What the numbers are, and what they are not. */
function summary(state) {
  const { clean, run, about } = state;
  const [tokens, perByte] = [clean.tokens.length, clean.tokens.length / clean.num_bytes / Math.LN2];
  const loss = run
    ? `${fixed(clean.nats)} → ${fixed(run.nats)} nats per token (${signed(run.nats - clean.nats)}), ${fixed(clean.nats * perByte)} → ${fixed(run.nats * perByte)} bits per byte`
    : `${fixed(clean.nats)} nats per token, ${fixed(clean.nats * perByte)} bits per byte`;
  const cut = clean.num_given > tokens ? ` Cut: these are the first ${tokens} of ${clean.num_given} tokens.` : "";
  const windows = tokens > clean.length ? ` Read in windows of ${clean.length} tokens, each without those before it.` : "";
  return [make("strong", {}, loss), ` One text of ${tokens} tokens: no interval.${cut}${windows}`];
}

// All of it ---------------------------------------------------------------------------------------

const TRAITS = ["about", "passage", "run", "curve", "card", "message", "answered", "perturbation", "strength", "where", "expert"];

function render({ model, el }) {
  const state = new State(model);
  state.read();
  const whole = state.about.view !== "tokens";
  let frame = 0;
  const redraw = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  };
  const text = textPanel(state, redraw);
  const modes = modePanel(state, redraw);
  const said = make("p", { class: "summary" });
  const message = make("p", { class: "message", role: "alert" });
  const main = make("div", { class: "main" }, modes.node, text.node);
  const parts = [modes, text];
  const nodes = [said, message];
  if (whole) {
    const [controls, curve, experts, grid, card] = [controlsPanel(state), curvePanel(state), expertsPanel(state, redraw), gridPanel(state), cardPanel(state)];
    parts.push(controls, curve, experts, grid, card);
    const side = make("div", { class: "side" }, curve.node, experts.node, card.node);
    main.append(grid.node);
    nodes.unshift(controls.node);
    nodes.push(make("div", { class: "columns" }, main, side));
  } else {
    nodes.push(main);
  }
  const root = make("div", { class: `moe-explorer ${whole ? "whole" : "alone"}` }, nodes);
  el.append(root);

  function draw() {
    state.read();
    root.classList.toggle("busy", model.get("asked") !== model.get("answered"));
    said.replaceChildren(...summary(state));
    message.textContent = model.get("message");
    parts.forEach((part) => part.draw());
    fill();
  }

  /** While nobody waits for anything else, the curve's points that nobody asked for yet. */
  function fill() {
    if (!state.about.live || model.get("asked") !== model.get("answered")) return;
    const next = model.get("curve").nats.indexOf(null);
    if (next >= 0) state.ask({ wanted: next });
  }

  TRAITS.forEach((name) => model.on(`change:${name}`, redraw));
  draw();
  return () => {
    TRAITS.forEach((name) => model.off(`change:${name}`, redraw));
    cancelAnimationFrame(frame);
  };
}

export default { render };
