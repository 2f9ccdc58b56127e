// A text under a model's eyes: tokens colored by what a condition does to them, the damage curve,
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
const HUES = 8; // of experts, in explorer.css; from one round of them to the next paler:
const DEPTHS = [0.85, 0.5, 0.28];
const SCALES = [0.1, 0.25, 0.5, 1, 2, 4, 8, 16]; // where colors end
const CHIPS = 32; // experts that a legend names

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
  node.append(...children.flat(2).filter((child) => child != null));
  return node;
}

/** A labelled field. */
const field = (name, control, ...more) =>
  make("label", { class: "field" }, make("span", { class: "name" }, name), control, ...more);

/** A select of [value, what people read]. */
function select(options, onchange) {
  const choices = options.map(([value, text]) => make("option", { value }, text));
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
const strengthText = ({ parameter }, strength) =>
  parameter === null ? (strength ? "on" : "off") : plain(strength);

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
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(+(n * step).toFixed(6));
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

/** The set of experts as a text. */
const setOf = (slots, position) =>
  String(
    expertsAt(slots, position)
      .map(([expert]) => expert)
      .sort(),
  );

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

const INVISIBLE = new RegExp(
  "[\\u0000-\\u0008\\u000b-\\u001f\\u007f-\\u009f\\u00ad\\u061c\\u180e\\u200b-\\u200f" +
    "\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffb]",
  "g",
);

const code = (character) => character.charCodeAt(0).toString(16).toUpperCase();

/** With codes for characters that cannot be seen, or would turn the others around. */
const visible = (text) => text.replace(INVISIBLE, (character) => `⟨${code(character)}⟩`);

/** On one line. */
const inline = (text) => visible(text).replaceAll("\n", "⏎").replaceAll("\t", "⇥");

// What is said of a token that shows nothing.
const BLANK = { " ": "space", "\n": "newline", "\t": "tab", "": "rest of a character" };

// The text ----------------------------------------------------------------------------------------

let views = 0;

/** The tokens: one tab stop, arrows move through them; a tooltip tells of one. */
function textPanel(state) {
  const id = `tokens-${views++}`;
  const tooltip = make("div", { class: "tooltip", role: "status", hidden: "" });
  const tokens = make("div", {
    class: "tokens",
    role: "listbox",
    tabindex: "0",
    "aria-label": "text, token by token; arrow keys move through it",
    keydown: move,
    focus: () => show(state.token ?? 0),
    blur: () => show(null),
    pointerover: ({ target }) => target.dataset.token && show(Number(target.dataset.token)),
    pointerleave: () => show(null),
  });
  const node = make("div", { class: "reader" }, tokens, tooltip);
  let shown;

  function move(event) {
    const now = state.token ?? 0;
    const last = tokens.children.length - 1;
    const moves = {
      ArrowLeft: () => now - 1,
      ArrowRight: () => now + 1,
      ArrowUp: () => lineFrom(now, -1),
      ArrowDown: () => lineFrom(now, 1),
      Home: () => 0,
      End: () => last,
    };
    if (event.key === "Escape") show(null);
    if (!(event.key in moves)) return;
    event.preventDefault();
    event.stopPropagation(); // JupyterLab would go to another cell
    show(Math.max(0, Math.min(last, moves[event.key]())));
    tokens.children[state.token].scrollIntoView({ block: "nearest" });
  }

  /** The token below or above one. */
  function lineFrom(token, step) {
    const at = (i) => tokens.children[i].getBoundingClientRect();
    const { left, top } = at(token);
    let found = token + step;
    while (tokens.children[found] && at(found).top === top) found += step;
    while (tokens.children[found + step]) {
      const next = at(found + step);
      if (next.top !== at(found).top || step * (next.left - left) > 0) break;
      found += step;
    }
    return found;
  }

  function show(token) {
    tokens.children[state.token]?.setAttribute("aria-selected", "false");
    state.token = token;
    tooltip.hidden = token === null;
    if (token === null) return tokens.removeAttribute("aria-activedescendant");
    const span = tokens.children[token];
    span.setAttribute("aria-selected", "true");
    tokens.setAttribute("aria-activedescendant", span.id);
    tooltip.replaceChildren(...describe(state, token));
    const [outer, own] = [node.getBoundingClientRect(), span.getClientRects()[0]];
    const room = outer.width - tooltip.offsetWidth;
    tooltip.style.left = `${Math.max(0, Math.min(room, own.left - outer.left))}px`;
    tooltip.style.top = `${own.bottom - outer.top + 6}px`;
  }

  function draw() {
    if (shown !== state.rawPassage) {
      shown = state.rawPassage;
      tokens.replaceChildren(
        ...state.clean.tokens.map((text, i) => {
          const said = visible(text).trim() ? undefined : (BLANK[text] ?? "blank");
          const named = { id: `${id}-${i}`, "data-token": i, "aria-label": said };
          return make(
            "span",
            { role: "option", "aria-selected": "false", ...named },
            visible(text),
          );
        }),
      );
    }
    paint(state, tokens.children);
    if (state.token !== null) tooltip.replaceChildren(...describe(state, state.token));
  }
  return { node, draw };
}

/** Colors and marks of all tokens. Of a color only its depth is set here; see explorer.css. */
function paint(state, tokens) {
  const { mode, before, after, damage, margin, lit } = state;
  const slots = mode === "before" ? before : after;
  const scale = scaleOf(state);
  const looks = {
    damage: (i) => [damage?.[i] > 0 ? "hurt" : "helped", Math.abs(damage?.[i] ?? 0) / scale],
    margin: (i) => ["margin", Math.max(0, 1 - margin[i + 1] / scale) ** 2],
    before: (i) => expertLook(expertsAt(slots, i + 1)[0]),
    after: (i) => expertLook(expertsAt(slots, i + 1)[0]),
  };
  const routed = state.run && (mode === "before" || mode === "after");
  for (let i = 0; i < tokens.length; i++) {
    const read = i + 1 < tokens.length;
    const [hue, depth] = read || mode === "damage" ? looks[mode](i) : ["none", 0];
    const token = tokens[i];
    token.dataset.hue = hue;
    token.style.setProperty("--depth", Math.max(0, Math.min(1, depth)).toFixed(2));
    const changed = routed && read && setOf(before, i + 1) !== setOf(after, i + 1);
    token.classList.toggle("changed", Boolean(changed));
    const uses = lit === null || (read && expertsAt(slots, i + 1).some(([e]) => e === lit));
    token.classList.toggle("dim", !uses);
  }
}

/** Hue and depth for a token whose first choice is this one; none if it has no expert. */
const expertLook = ([expert] = []) =>
  expert === undefined ? ["none", 0] : [expert % HUES, DEPTHS[Math.floor(expert / HUES) % DEPTHS.length]];

function scaleOf(state) {
  if (state.mode === "damage") return state.run ? roundScale(state.damage, 0.97) : 1;
  return state.mode === "margin" ? roundScale(state.margin, 0.9) : null;
}

/** What a token's tooltip says. */
function describe(state, token) {
  const { clean, run, damage } = state;
  const row = (name, ...values) => make("div", {}, make("b", {}, name), " ", ...values);
  const told = ([expert, weight]) => `${expert} (${weight.toFixed(2)})`;
  const list = (slots) =>
    expertsAt(slots, token + 1)
      .map(told)
      .join(", ") || "none";
  const loss = run
    ? `${fixed(clean.nll[token])} → ${fixed(run.nll[token])} nats (${signed(damage[token])})`
    : `${fixed(clean.nll[token])} nats`;
  const own = clean.tokens[token];
  const text = own ? `“${inline(own)}”` : "(part of the character before)";
  const rows = [row(text, `token ${token + 1}`), row("loss", loss)];
  if (token + 1 === clean.tokens.length) return [...rows, row("read by", "nobody: it is the last")];
  const [before, after] = [list(state.before), list(state.after)];
  const name = state.about.sites.length > 1 ? `experts, ${state.siteName}` : "experts";
  rows.push(row(name, run && after !== before ? `${before} → ${after}` : before));
  return [...rows, row("margin", fixed(state.margin[token + 1]))];
}

/** What colors mean, with numbers. */
function legend(state) {
  const scale = scaleOf(state);
  const ramp = (hues, low, middle, high) => [
    make("span", {}, low),
    make("span", { class: `ramp ${hues}` }, middle),
    make("span", {}, high),
  ];
  if (state.mode === "damage") return ramp("diverging", `−${scale}`, "0", `+${scale} nats`);
  if (state.mode === "margin") return ramp("sequential", "0: about to change (or no expert left to change to)", "", `${scale}`);
  const { experts } = state.about.sites[state.site];
  const chips = Array.from({ length: Math.min(CHIPS, experts) }, (_, expert) => {
    const chip = make("span", { class: "chip" }, String(expert));
    const [hue, depth] = expertLook([expert]);
    chip.dataset.hue = hue;
    chip.style.setProperty("--depth", depth);
    return chip;
  });
  const said = "first choice; underlined: another set under the perturbation";
  return [make("span", { class: "chips" }, chips), make("span", {}, said)];
}

// The other panels --------------------------------------------------------------------------------

/** Nats per token over the strengths of the perturbation; a click on a point chooses it. */
function curvePanel(state) {
  const [width, height, left, right, top, bottom] = [380, 210, 46, 14, 12, 38];
  const picture = make("div");
  const progress = make("p", { class: "note" });
  const node = panel("damage", "Damage curve: loss in nats per token", picture, progress);

  function draw() {
    const { control, model, clean, about } = state;
    const { strengths, parameter, name } = control;
    const { nats } = model.get("curve");
    const known = nats.filter(Number.isFinite);
    const [x0, x1] = [strengths[0], strengths.at(-1)];
    const [low, high] = [Math.min(clean.nats, ...known), Math.max(clean.nats, ...known)];
    const room = 0.06 * (high - low || 1);
    const x = (s) => left + ((s - x0) / (x1 - x0 || 1)) * (width - left - right);
    const y = (v) => top + ((high + room - v) / (high - low + 2 * room)) * (height - top - bottom);
    const across = (v, kind) =>
      make("line", { class: kind, x1: left, x2: width - right, y1: y(v), y2: y(v) });
    const label = (text, x, y, anchor, kind) =>
      make("text", { x, y, "text-anchor": anchor, class: kind }, text);

    const rules = ticks(low - room, high + room).flatMap((v) => [
      across(v, "rule"),
      label(plain(v), left - 6, y(v) + 4, "end"),
    ]);
    let edge = -Infinity; // of the number before, so that none stand on each other
    const numbers = strengths.map((s) => {
      const text = strengthText(control, s);
      if (x(s) - 3.5 * text.length < edge) return null;
      edge = x(s) + 3.5 * text.length + 3;
      return label(text, x(s), height - bottom + 16, "middle");
    });
    const points = strengths
      .map((s, i) => ({ s, v: nats[i], now: s === model.get("strength") }))
      .filter(({ v }) => Number.isFinite(v));
    const line = points.map(
      ({ s, v }, i) => `${i ? "L" : "M"}${x(s).toFixed(1)} ${y(v).toFixed(1)}`,
    );
    const marks = points.map(({ s, v, now }) => {
      const look = { class: now ? "point now" : "point", r: now ? 5.5 : 3.5 };
      const choose = { click: () => state.ask({ strength: s }) };
      const told = make("title", {}, `${parameter ?? name} ${plain(s)}: ${fixed(v)}`);
      return make("circle", { cx: x(s), cy: y(v), ...look, ...choose }, told);
    });
    const range = `${fixed(low)} to ${fixed(high)} nats per token, clean ${fixed(clean.nats)}`;
    const named = { role: "img", "aria-label": `Damage curve of ${name}: ${range}` };
    picture.replaceChildren(
      make(
        "svg",
        { viewBox: `0 0 ${width} ${height}`, ...named },
        rules,
        across(clean.nats, "clean"),
        label("clean", width - right, y(clean.nats) - 5, "end"),
        make("path", { class: "curve", d: line.join("") }),
        marks,
        numbers,
        label(parameter ?? name, (left + width - right) / 2, height - 4, "middle", "title"),
      ),
    );
    const missing = nats.filter((v) => v === null).length;
    const busy = missing && about.live;
    progress.textContent = busy ? `${nats.length - missing} of ${nats.length} points` : "";
  }
  return { node, draw };
}

/** Each expert's share of the slots, clean and perturbed; a click asks for its card. */
function expertsPanel(state, redraw) {
  const bar = (kind) => make("i", { class: kind });
  const said = "perturbed; a click opens an expert's card";
  const key = make("p", { class: "key note" }, bar("before"), "clean ", bar("after"), said);
  const rows = make("div", { class: "rows" });
  const node = panel("experts", "Experts: share of the slots", key, rows);

  const light = (expert) => () => {
    state.lit = expert;
    redraw();
  };

  function row(expert) {
    const bars = make("span", { class: "bars" }, bar("before"), bar("after"));
    const acts = {
      click: () => state.ask({ expert: [state.site, expert] }),
      pointerenter: light(expert),
      pointerleave: light(null),
      focus: light(expert),
      blur: light(null),
    };
    const name = make("span", { class: "id" }, String(expert));
    return make(
      "button",
      { type: "button", ...acts },
      name,
      bars,
      make("span", { class: "shares" }),
    );
  }

  function draw() {
    const { experts } = state.about.sites[state.site];
    const [before, after] = [loads(state.before, experts), loads(state.after, experts)];
    const most = Math.max(...before, ...after) || 1;
    if (rows.children.length !== experts) {
      rows.replaceChildren(...Array.from({ length: experts }, (_, expert) => row(expert)));
    }
    const [site, picked] = state.model.get("expert");
    for (const [e, button] of [...rows.children].entries()) {
      const [, bars, shares] = button.children;
      [before, after].forEach((load, i) => {
        bars.children[i].style.width = `${(100 * load[e]) / most}%`;
      });
      shares.textContent = percent(before[e]) + (state.run ? ` → ${percent(after[e])}` : "");
      button.setAttribute("aria-pressed", String(site === state.site && picked === e));
    }
  }
  return { node, draw };
}

/** Of a Cartesian layer: how often A's and B's experts are used together, before and after. */
function gridPanel(state) {
  const maps = make("div", { class: "maps" });
  const node = panel("grid", "", maps);

  function heat(title, share, most) {
    const [rows, columns] = [share.length, share[0].length];
    const cell = 200 / Math.max(rows, columns);
    const cells = share.flatMap((line, a) =>
      Array.from(line, (v, b) => {
        const place = {
          x: 22 + b * cell,
          y: 6 + a * cell,
          width: 0.95 * cell,
          height: 0.95 * cell,
        };
        const look = { class: "cell", "fill-opacity": Math.sqrt(v / most).toFixed(3) };
        return make(
          "rect",
          { ...place, ...look },
          make("title", {}, `A ${a}, B ${b}: ${percent(v)}`),
        );
      }),
    );
    const [w, h] = [columns * cell, rows * cell];
    const named = `${title}: A in rows, B in columns, up to ${percent(largest(share))}`;
    const svg = make(
      "svg",
      { viewBox: `0 0 ${w + 26} ${h + 26}`, role: "img", "aria-label": named },
      make("rect", { class: "frame", x: 21, y: 5, width: w + 2, height: h + 2 }),
      cells,
      make("text", { x: 14, y: 6 + h / 2, "text-anchor": "end" }, "A"),
      make("text", { x: 22 + w / 2, y: h + 20, "text-anchor": "middle" }, "B"),
    );
    return make("figure", {}, svg, make("figcaption", {}, title));
  }

  function draw() {
    const { layer } = state.about.sites[state.site];
    const [A, B] = state.about.sites.filter((site) => site.layer === layer);
    node.hidden = !B;
    if (!B) return;
    const use = ({ slots }) => jointUse(slots[A.name], slots[B.name], A.experts, B.experts);
    const found = { clean: use(state.clean), ...(state.run && { perturbed: use(state.run) }) };
    const most = Math.max(...Object.values(found).map(largest)) || 1;
    const figures = Object.entries(found).map(([title, share]) => heat(title, share, most));
    maps.replaceChildren(...figures);
    const title = `A × B of layer ${layer}: used together, by up to ${percent(most)} of tokens`;
    node.firstChild.textContent = title;
  }
  return { node, draw };
}

const largest = (share) => Math.max(...share.map((line) => Math.max(...line)));

/** What is known of the expert that was clicked. */
function cardPanel(state) {
  const node = make("section", { class: "panel card", "aria-live": "polite" });
  let shown;

  const open = (site, expert) => () => {
    const number = state.about.sites.findIndex(({ name }) => name === site);
    state.ask({ expert: [number, expert] });
  };
  const small = (text) => make("small", {}, text);
  const list = (title, kind, items) =>
    items.length ? [make("h3", {}, title), make("ul", { class: kind }, items)] : [];

  const context = ({ before, token, after, weight }) => {
    const read = make("mark", {}, inline(token).replaceAll(" ", "␣"));
    const around = (text) => make("bdi", {}, inline(text));
    return make("li", {}, around(before), read, around(after), small(weight.toFixed(2)));
  };
  const affinity = ({ name, share, tokens }) => {
    const bar = make("i", { class: "after" });
    bar.style.width = `${100 * share}%`;
    const bars = make("span", { class: "bars" }, bar);
    return make("li", {}, make("span", {}, name), bars, small(`${percent(share)} of ${tokens}`));
  };
  const near =
    (site) =>
    ({ expert, cka, null: chance }) => {
      const button = make(
        "button",
        { type: "button", click: open(site, expert) },
        `expert ${expert}`,
      );
      return make("li", {}, button, small(`${fixed(cka, 2)} (null ${fixed(chance, 2)})`));
    };

  function draw() {
    const card = state.model.get("card");
    node.hidden = !card.site;
    if (shown === card || !card.site) return;
    shown = card;
    const facts = {
      load: `${percent(card.load)} of the slots, at a mean weight of ${card.weight.toFixed(2)}`,
      "when dropped": `${signed(card.damage, 4)} nats per token`,
    };
    const from = card.num_documents === 1 ? "one text" : `${card.num_documents} documents`;
    const close = { "aria-label": "close the card", click: () => state.ask({ expert: [] }) };
    node.replaceChildren(
      make("h2", {}, `Expert ${card.expert}, ${card.site}`),
      make("button", { type: "button", class: "close", ...close }, "×"),
      make(
        "dl",
        {},
        ...Object.entries(facts).map(([k, v]) => [make("dt", {}, k), make("dd", {}, v)]),
      ),
      ...list("Its heaviest tokens", "contexts", card.contexts.map(context)),
      ...list(`Share of tokens it reads, by ${card.by}`, "affinity", card.affinity.map(affinity)),
      ...list("Nearest by outputs (CKA)", "nearest", card.nearest.map(near(card.site))),
      make("p", { class: "note" }, `From ${card.num_tokens} tokens of ${from}: no interval.`),
    );
  }
  return { node, draw };
}

/** Perturbation, strength, sites; in a notebook another text. */
function controlsPanel(state) {
  const { model, about } = state;
  const perturbation = select(
    about.controls.map(({ name }) => [name, name]),
    (name) => {
      const { start } = about.controls.find((control) => control.name === name);
      state.ask({ perturbation: name, strength: start });
    },
  );
  const slider = make("input", {
    ...{ type: "range", min: 0, step: 1 },
    input: () => state.ask({ strength: state.control.strengths[slider.value] }),
  });
  const value = make("output");
  const strength = field("", slider, value);
  const where = select(
    about.places.map((place) => [place, place]),
    (place) => state.ask({ where: place }),
  );
  const note = make("p", { class: "note" });
  const node = make("div", { class: "controls" }, field("perturbation", perturbation), strength);
  node.append(field("at", where), note);

  const read = () => state.ask({ text: text.value });
  const text = make("textarea", {
    ...{ rows: 6, spellcheck: "false", "aria-label": "text to read" },
    "data-lm-suppress-shortcuts": "true", // JupyterLab has keys of its own
    keydown: (event) => event.key === "Enter" && (event.ctrlKey || event.metaKey) && read(),
  });
  const button = make("button", { type: "button", click: read }, "Read it");
  if (about.live)
    node.append(make("details", {}, make("summary", {}, "Another text"), text, button));
  let given;

  function draw() {
    const { control, clean } = state;
    const now = model.get("strength");
    const distances = control.strengths.map((s) => Math.abs(s - now));
    perturbation.value = control.name;
    where.value = model.get("where");
    slider.max = control.strengths.length - 1;
    slider.value = distances.indexOf(Math.min(...distances));
    slider.disabled = control.strengths.length < 2;
    value.textContent = strengthText(control, now);
    slider.setAttribute("aria-valuetext", value.textContent);
    strength.firstChild.textContent = control.parameter ?? "strength";
    note.textContent = control.about;
    if (given !== clean.text) text.value = given = clean.text;
  }
  return { node, draw };
}

/** How the text is colored, and at which site. */
function modePanel(state, redraw) {
  const group = `mode-${views++}`;
  const choose = (change) => {
    Object.assign(state, change);
    redraw();
  };
  const radios = Object.entries(MODES).map(([mode, name]) => {
    const checked = mode === state.mode && "";
    const radio = { type: "radio", name: group, value: mode, checked };
    const input = make("input", { ...radio, change: () => choose({ mode }) });
    return make("label", {}, input, make("span", {}, name));
  });
  const sites = state.about.sites.map(({ name }, i) => [i, name]);
  const site = select(sites, (number) => choose({ site: Number(number) }));
  const key = make("div", { class: "legend" });
  const colors = make("fieldset", {}, make("legend", {}, "color"), radios);
  const node = make("div", { class: "modes" }, colors, field("site", site), key);
  const draw = () => key.replaceChildren(...legend(state));
  return { node, draw };
}

/** What the numbers are, and what they are not. */
function summary({ clean, run }) {
  const tokens = clean.tokens.length;
  const bits = (nats) => fixed((nats * tokens) / clean.num_bytes / Math.LN2);
  const loss = run
    ? `${fixed(clean.nats)} → ${fixed(run.nats)} nats per token ` +
      `(${signed(run.nats - clean.nats)}), ${bits(clean.nats)} → ${bits(run.nats)} bits per byte`
    : `${fixed(clean.nats)} nats per token, ${bits(clean.nats)} bits per byte`;
  const notes = [` One text of ${tokens} tokens: no interval.`];
  if (clean.num_given > tokens)
    notes.push(`Cut to the first ${tokens} of ${clean.num_given} tokens.`);
  if (tokens > clean.length) {
    notes.push(`Read in windows of ${clean.length} tokens, each without those before it.`);
  }
  return [make("strong", {}, loss), notes.join(" ")];
}

// All of it ---------------------------------------------------------------------------------------

const ANSWERS = ["about", "passage", "run", "curve", "card", "message", "answered"];
const QUESTION = ["perturbation", "strength", "where", "expert"];

function render({ model, el }) {
  const state = new State(model);
  state.read();
  let frame = 0;
  const redraw = () => {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  };
  const said = make("p", { class: "summary" });
  const message = make("p", { class: "message", role: "alert" });
  const [modes, text] = [modePanel(state, redraw), textPanel(state)];
  const main = make("div", { class: "main" }, modes.node, text.node);
  const root = make("div", { class: "moe-explorer" });
  let panels = [modes, text];
  if (state.about.view === "tokens") {
    root.append(said, message, main);
  } else {
    const controls = controlsPanel(state);
    const grid = gridPanel(state);
    const beside = [curvePanel(state), expertsPanel(state, redraw), cardPanel(state)];
    panels = [controls, ...panels, grid, ...beside];
    main.append(grid.node);
    const side = make("div", { class: "side" }, ...beside.map(({ node }) => node));
    root.append(controls.node, said, message, make("div", { class: "columns" }, main, side));
  }
  el.append(root);

  function draw() {
    state.read();
    root.classList.toggle("busy", waits());
    said.replaceChildren(...summary(state));
    message.textContent = model.get("message");
    panels.forEach((panel) => panel.draw());
    fill();
  }

  const waits = () => model.get("asked") !== model.get("answered");

  /** While nothing else is waited for, the next point of the curve that nobody asked for yet. */
  function fill() {
    const next = model.get("curve").nats.indexOf(null);
    if (state.about.live && next >= 0 && !waits()) state.ask({ wanted: next });
  }

  const events = [...ANSWERS, ...QUESTION].map((name) => `change:${name}`);
  events.forEach((event) => model.on(event, redraw));
  draw();
  return () => {
    events.forEach((event) => model.off(event, redraw));
    cancelAnimationFrame(frame);
  };
}

export default { render };
