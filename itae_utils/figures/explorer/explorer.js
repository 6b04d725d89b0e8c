// The explorer of ITAE: move θ and watch the attention of [CLS] jump.
//
// One ES module for a page without a kernel (`mount`) and for anywidget (`render`). It gets the data of
// `itae_utils.figures.explorer.data`, loads nothing, and redoes the edits of attention weights exactly.
// Sections: data, method, parts of the page, image panel, θ panel, strip, map panel, address and files, a kernel behind
// the view, the view.

// ---- Data ------------------------------------------------------------------------------------------------------

function bytesOf(text) {
  const binary = atob(text), bytes = new Uint8Array(binary.length);
  for (let i = 0; i < bytes.length; i++) bytes[i] = binary.charCodeAt(i);
  return bytes;
}

function fromFloat16(bits) {
  const sign = bits >> 15 ? -1 : 1, exponent = (bits >> 10) & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return exponent ? sign * (1 + fraction / 1024) * 2 ** (exponent - 15) : sign * fraction * 2 ** -24;
}

/** Return the numbers of {type, shape, data} as a Float32Array; data is base64, or a DataView from a kernel. */
function numbersOf({ type, data }) {
  const view = typeof data === "string" ? new DataView(bytesOf(data).buffer) : data;
  const width = type === "float16" ? 2 : 4, numbers = new Float32Array(view.byteLength / width);
  for (let i = 0; i < numbers.length; i++) {
    numbers[i] = width === 2 ? fromFloat16(view.getUint16(2 * i, true)) : view.getFloat32(4 * i, true);
  }
  return numbers;
}

/** Add an image of one's own, as it was sent, to a decoded panel; its number is -1. */
function addImage(panel, { pictures, logits, statistics }) {
  const joined = (first, second) => { const all = new Float32Array(first.length + second.length); all.set(first); all.set(second, first.length); return all; };
  panel.numbers = [...panel.numbers, -1];
  panel.pictures = [...panel.pictures, ...pictures];
  panel.logits = joined(panel.logits, numbersOf(logits));
  for (const name in panel.statistics) panel.statistics[name] = joined(panel.statistics[name], numbersOf(statistics[name]));
}

/** Return the data with its arrays decoded. */
function decoded(data) {
  const [, heads, tokens] = data.panel.logits.shape, [rows, columns] = data.grid;
  const statistics = {};
  for (const [name, array] of Object.entries(data.panel.statistics)) statistics[name] = numbersOf(array);
  return {
    ...data, heads, tokens, rows, columns, patches: rows * columns,
    sources: data.sources.map((source) => ({ ...source, quantiles: numbersOf(source.quantiles) })),
    panel: { ...data.panel, logits: numbersOf(data.panel.logits), statistics },
    map: { ...data.map, change: numbersOf(data.map.change), points: data.map.points && data.map.points.map(numbersOf) },
  };
}

// ---- Method: what `attenuated_logits` does in Python -------------------------------------------------------------

const EDITS = {
  min: "min: to the row's smallest logit", mask: "mask: to weight 0", mean: "mean: to the mean normal logit",
  scale: "scale: weights times α", spread: "spread: shared among the normal patches",
  clip: "clip: to the largest normal logit", substitute: "substitute: the values, not the weights",
};

/** Return which patches of an image are artifacts, as a Uint8Array. */
function artifactsOf(values, theta, side) {
  const mask = new Uint8Array(values.length);
  if (theta === null) return mask;
  const limit = Math.fround(theta); // Python compares in float32, too
  for (let i = 0; i < mask.length; i++) mask[i] = side === "low" ? values[i] <= limit : values[i] >= limit;
  return mask;
}

/** Return a row's logits after an edit of its artifacts; the last patches of the row's tokens are edited. */
function editedLogits(logits, artifacts, edit, alpha) {
  const prefix = logits.length - artifacts.length, row = Float64Array.from(logits);
  let normal = 0, lowest = Infinity, highest = -Infinity, sum = 0;
  for (let i = 0; i < artifacts.length; i++) {
    const logit = row[prefix + i];
    lowest = Math.min(lowest, logit); // over all patches, artifacts included
    if (!artifacts[i]) { normal++; sum += logit; highest = Math.max(highest, logit); }
  }
  if (normal === artifacts.length || (!normal && ["mean", "spread", "clip"].includes(edit))) return row;
  const change = {
    min: () => lowest, mask: () => -Infinity, mean: () => sum / normal, scale: (logit) => logit + Math.log(alpha),
    clip: (logit) => Math.min(logit, highest), spread: () => -Infinity, substitute: (logit) => logit,
  }[edit];
  let taken = 0;
  for (let i = 0; i < artifacts.length; i++) {
    if (!artifacts[i]) continue;
    taken += Math.exp(row[prefix + i]);
    row[prefix + i] = change(row[prefix + i]);
  }
  if (edit === "spread") {
    for (let i = 0; i < artifacts.length; i++) {
      if (!artifacts[i]) row[prefix + i] = Math.log(Math.exp(row[prefix + i]) + taken / normal);
    }
  }
  return row;
}

/** Add the softmax of a row, over all tokens, to the shares of its patches. */
function addWeights(row, shares, factor) {
  let largest = -Infinity, sum = 0;
  for (const logit of row) largest = Math.max(largest, logit);
  const weights = row.map((logit) => { const each = Math.exp(logit - largest); sum += each; return each; });
  const prefix = row.length - shares.length;
  for (let i = 0; i < shares.length; i++) shares[i] += (factor * weights[prefix + i]) / sum;
}

/** Return the share of [CLS] attention of every patch of an image before and after an edit: one head, or the mean. */
function attention(data, place, head, artifacts, edit, alpha) {
  const before = new Float64Array(data.patches), after = new Float64Array(data.patches);
  const heads = head === null ? [...Array(data.heads).keys()] : [head];
  for (const each of heads) {
    const start = (place * data.heads + each) * data.tokens;
    const row = Float64Array.from(data.panel.logits.subarray(start, start + data.tokens));
    addWeights(row, before, 1 / heads.length);
    addWeights(editedLogits(row, artifacts, edit, alpha), after, 1 / heads.length);
  }
  return { before, after };
}

function shareOn(weights, mask) {
  return weights.reduce((sum, weight, i) => sum + (mask[i] ? weight : 0), 0);
}

/** Return the share of the sample's patches on a side of θ, by the sample's quantiles. */
function shareBeyond({ quantiles, side }, theta) {
  if (theta === null) return 0;
  const limit = Math.fround(theta), last = quantiles.length - 1;
  let low = 0, high = last + 1; // the number of quantiles at or below θ
  while (low < high) {
    const middle = (low + high) >> 1;
    if (quantiles[middle] <= limit) low = middle + 1; else high = middle;
  }
  const between = low > 0 && low <= last ? (limit - quantiles[low - 1]) / (quantiles[low] - quantiles[low - 1]) : 0;
  const below = Math.min(1, Math.max(0, (low - 1 + between) / last));
  return side === "low" ? below : 1 - below;
}

// ---- Parts of the page ---------------------------------------------------------------------------------------------

const SVG = "http://www.w3.org/2000/svg";

/** Return an element with attributes, listeners (on…) and children. */
function make(name, attributes = {}, ...children) {
  const svg = ["svg", "g", "path", "rect", "line", "text", "circle"].includes(name);
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else if (value === true) element.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(key, value);
  }
  element.append(...children.filter((child) => child !== null));
  return element;
}

function choice(label, options, onchange) {
  const select = make("select", { onchange: () => onchange(select.value) },
    ...options.map(([value, text]) => make("option", { value }, text)));
  return { select, field: make("label", { class: "field" }, make("span", {}, label), select) };
}

function button(text, onclick) {
  return make("button", { type: "button", onclick }, text);
}

const jpeg = (text) => `data:image/jpeg;base64,${text}`;
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;
const number = (value) => (value === null ? "none" : value !== 0 && Math.abs(value) < 1e-3 ? value.toExponential(2) : String(Number(value.toPrecision(4))));
const percent = (share) => `${share === 0 ? 0 : share < 0.001 ? "< 0.1" : Number((100 * share).toPrecision(share < 0.0995 ? 2 : 3))} %`;

// Anchors of the map cividis, which looks alike to people with and without colour blindness.
const CIVIDIS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120],
  [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];

function colourOf(level) {
  const place = Math.min(1, Math.max(0, level)) * (CIVIDIS.length - 1), low = Math.min(CIVIDIS.length - 2, Math.floor(place));
  const mixed = CIVIDIS[low].map((each, i) => Math.round(each + (place - low) * (CIVIDIS[low + 1][i] - each)));
  return `rgb(${mixed})`;
}

const sizes = new WeakMap(); // of elements on the page: reading them while drawing would make the browser lay out again

/** Call `redraw` whenever one of some elements changes its size. */
function watchSizes(elements, redraw) {
  const observer = new ResizeObserver((entries) => {
    for (const { target, contentRect: { width, height } } of entries) sizes.set(target, { width, height });
    redraw();
  });
  for (const element of elements) observer.observe(element);
  return observer;
}

function sizeOf(element) {
  return sizes.get(element) ?? { width: element.clientWidth, height: element.clientHeight };
}

/** Set a canvas to its size on the page, and return its context in CSS pixels. */
function contextOf(canvas) {
  const { width, height } = sizeOf(canvas), ratio = window.devicePixelRatio || 1;
  const size = [Math.max(1, Math.round(width * ratio)), Math.max(1, Math.round(height * ratio))];
  if (canvas.width !== size[0]) canvas.width = size[0];
  if (canvas.height !== size[1]) canvas.height = size[1];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width, height };
}

/** Move the focus in a list of buttons by the arrow keys; the Tab key enters the list once and leaves it. */
function moveFocus(event) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (!step) return;
  const all = [...event.currentTarget.querySelectorAll("button")], next = all[all.indexOf(event.target) + step];
  if (next) { letIn(all, next); next.focus(); event.preventDefault(); }
}

function letIn(all, one = all[0]) {
  for (const each of all) each.tabIndex = each === one ? 0 : -1;
}

// ---- Image panel: the image, and its attention before and after ----------------------------------------------------

function imagePanel(view) {
  const { data, state } = view;
  const names = ["Image", "Attention before", "Attention after"];
  const canvases = names.map((name, i) => make("canvas", {
    role: i ? "img" : "application", tabindex: i ? null : 0, "aria-label": name,
    "aria-roledescription": i ? null : "image of patches", "aria-describedby": i ? null : `${view.id}-patch-keys`,
    onpointermove: (event) => { if (event.pointerType === "mouse") hover(event); },
    onpointerleave: () => { view.hovered = null; view.redraw(); },
    onclick: (event) => pin(patchAt(event)), onkeydown: i ? () => {} : key,
  }));
  for (const canvas of canvases) canvas.style.aspectRatio = `${data.columns} / ${data.rows}`;
  const head = choice("Head", [["mean", "mean of all"], ...Array.from({ length: data.heads }, (_, i) => [i, `head ${i}`])],
    (value) => view.set({ head: value === "mean" ? null : Number(value) }));
  const scale = choice("Colours", [["sqrt", "square root"], ["linear", "linear"]], (value) => view.set({ scale: value }));
  const frames = make("input", { type: "checkbox", onchange: () => view.set({ frames: frames.checked }) });
  const summary = make("p", { class: "summary", role: "status" });
  const readout = make("div", { class: "readout", "aria-live": "polite" });
  const bar = make("div", { class: "bar-of-colours", "aria-hidden": "true" }), least = make("span", {}, "0"), most = make("span");
  bar.style.background = `linear-gradient(to right, ${Array.from({ length: 16 }, (_, i) => colourOf(i / 15)).join(",")})`;
  const picture = new Image();
  picture.onload = () => view.redraw();
  let shown = null;

  function patchAt(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const column = Math.floor(((event.clientX - box.left) / box.width) * data.columns);
    const row = Math.floor(((event.clientY - box.top) / box.height) * data.rows);
    const clamp = (value, count) => Math.min(count - 1, Math.max(0, value));
    return clamp(row, data.rows) * data.columns + clamp(column, data.columns);
  }

  function hover(event) {
    const patch = patchAt(event);
    if (patch !== view.hovered) { view.hovered = patch; view.redraw(); }
  }

  function pin(patch) {
    view.hovered = null;
    view.set({ patch: patch === state.patch ? null : patch });
  }

  function key(event) {
    const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[event.key];
    const at = view.hovered ?? state.patch;
    if (move) {
      const row = at === null ? 0 : Math.floor(at / data.columns) + move[0];
      const column = at === null ? 0 : (at % data.columns) + move[1];
      if (row >= 0 && row < data.rows && column >= 0 && column < data.columns) view.hovered = row * data.columns + column;
      view.redraw();
    } else if ((event.key === "Enter" || event.key === " ") && at !== null) pin(at);
    else if (event.key === "Escape") { view.hovered = null; view.set({ patch: null }); }
    else return;
    event.preventDefault();
  }

  function drawCells(canvas, paint) {
    const { context, width, height } = contextOf(canvas), { artifacts } = view.now;
    const side = [width / data.columns, height / data.rows];
    const box = (i) => {
      const x = Math.round((i % data.columns) * side[0]), y = Math.round(Math.floor(i / data.columns) * side[1]);
      return [x, y, Math.round(((i % data.columns) + 1) * side[0]) - x, Math.round((Math.floor(i / data.columns) + 1) * side[1]) - y];
    };
    paint(context, width, height, box);
    const line = Math.max(1.5, Math.min(2.5, side[0] / 8));
    const frame = (i, colour, thick) => {
      const [x, y, w, h] = box(i);
      context.strokeStyle = colour; context.lineWidth = thick;
      context.strokeRect(x + thick / 2, y + thick / 2, w - thick, h - thick);
    };
    if (state.frames) artifacts.forEach((is, i) => { if (is) { frame(i, "#fff", line + 1); frame(i, "#d4351c", line); } });
    const at = view.hovered ?? state.patch;
    if (at !== null && at < data.patches) { frame(at, "#fff", line + 3); frame(at, "#000", line + 1); }
  }

  function draw() {
    const { place, before, after, artifacts } = view.now, image = data.panel.numbers[place];
    if (shown !== place) { picture.src = jpeg(data.panel.pictures[place]); shown = place; }
    drawCells(canvases[0], (context, width, height) => {
      context.imageSmoothingEnabled = picture.naturalWidth > 64;
      if (picture.complete && picture.naturalWidth) context.drawImage(picture, 0, 0, width, height);
    });
    const largest = Math.max(...before, ...after) || 1;
    const level = state.scale === "sqrt" ? (share) => Math.sqrt(share / largest) : (share) => share / largest;
    [before, after].forEach((shares, i) => drawCells(canvases[i + 1], (context, _w, _h, box) => {
      shares.forEach((share, patch) => { context.fillStyle = colourOf(level(share)); context.fillRect(...box(patch)); });
    }));
    most.textContent = percent(largest);
    const count = shareOn(artifacts, artifacts), of = state.head === null ? "" : ` of head ${state.head}`;
    const held = [before, after].map((shares) => percent(shareOn(shares, artifacts)));
    summary.textContent = count === 0 ? `${view.nameOf(image)}: no patch is an artifact, so nothing changes.`
      : `${view.nameOf(image)}: ${count} of ${data.patches} patches ${count === 1 ? "is an artifact. It holds" : "are artifacts. They hold"} `
        + `${held[0]} of the [CLS] attention${of} before, ${held[1]} after.`;
    canvases[0].setAttribute("aria-label", `${view.nameOf(image)}, ${data.rows} by ${data.columns} patches`);
    canvases[1].setAttribute("aria-label", `Attention${of} before: ${held[0]} on artifacts`);
    canvases[2].setAttribute("aria-label", `Attention${of} after: ${held[1]} on artifacts`);
    head.select.value = state.head ?? "mean"; scale.select.value = state.scale; frames.checked = state.frames;
    readout.replaceChildren(...describePatch());
  }

  function describePatch() {
    const at = view.hovered ?? state.patch, { place, before, after, artifacts } = view.now;
    if (at === null) return [make("p", { class: "hint" }, "Point at a patch, or tap it, to read its values; a click pins it.")];
    const where = `Row ${Math.floor(at / data.columns)}, column ${at % data.columns}`;
    const facts = [["share before", percent(before[at])], ["share after", percent(after[at])],
      ...data.sources.map(({ name, symbol }) => [symbol, number(data.panel.statistics[name][place * data.patches + at])])];
    return [make("p", {}, make("strong", {}, where), `${at === state.patch ? ", pinned" : ""}: ${artifacts[at] ? "an artifact" : "a normal patch"}`),
      make("dl", {}, ...facts.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))))];
  }

  const figures = canvases.map((canvas, i) => make("figure", {}, make("figcaption", {}, names[i]), canvas));
  const element = make("section", { class: "image-panel", "aria-label": "Attention of one image" },
    make("div", { class: "controls" }, head.field, scale.field, make("label", { class: "check" }, frames, "frame artifacts"),
      make("div", { class: "scale" }, least, bar, most)),
    make("div", { class: "pictures" }, ...figures), summary, readout,
    make("p", { id: `${view.id}-patch-keys`, class: "unseen" }, "Arrow keys move from patch to patch, Enter pins one, Escape lets it go."));
  return { element, draw, canvases };
}

// ---- θ panel: the statistic over the sample, with θ as a handle ------------------------------------------------------

function thetaPanel(view) {
  const { data, state } = view, height = 150, top = 22, floor = 130;
  const svg = make("svg", { class: "histogram", height, role: "group", "aria-label": "Distribution of the statistic, with θ" });
  const source = choice("Statistic", data.sources.map(({ name, symbol }) => [name, symbol]), (value) => view.chooseSource(value));
  const edit = choice("Edit", Object.entries(EDITS), (value) => view.set({ edit: value }));
  const alpha = make("input", { type: "number", min: 0.001, max: 0.999, step: 0.05, oninput: () => {
    const value = alpha.valueAsNumber;
    if (value > 0 && value < 1) view.set({ alpha: value });
  }, onchange: () => { alpha.value = state.alpha; } }); // what is not valid does not stay
  const theta = make("input", { type: "number", step: "any", min: 0, inputmode: "decimal", oninput: () => {
    if (theta.value === "") view.set({ theta: null });
    else if (theta.valueAsNumber >= 0) view.set({ theta: theta.valueAsNumber });
  }, onchange: () => { theta.value = state.theta ?? ""; } });
  const blocks = view.kernel ? data.live.blocks : 0;
  const block = choice(`Block of ${blocks}`, Array.from({ length: blocks }, (_, i) => [i, i + 1]), (value) => view.kernel.want({ block: Number(value) }));
  const share = make("output", { class: "share" }), caption = make("p", { class: "hint caption" }), verdict = make("p", { class: "hint" });
  const back = button("Back to the run's θ", () => view.set({ ...view.ofRun(), patch: state.patch }));
  const alphaField = make("label", { class: "field" }, make("span", {}, "α"), alpha);
  const handle = make("g", { role: "slider", tabindex: 0, class: "handle", "aria-label": "θ", "aria-orientation": "horizontal",
    onkeydown: key });
  let drawn = "", toX = (value) => value, fromX = toX, dragging = false;

  const current = () => data.sources.find(({ name }) => name === state.source);

  function place(event) {
    const value = fromX(event.clientX - svg.getBoundingClientRect().left);
    view.set({ theta: Number(value.toPrecision(4)) });
  }
  svg.addEventListener("pointerdown", (event) => {
    dragging = true; svg.setPointerCapture(event.pointerId); place(event); handle.focus({ preventScroll: true });
  });
  svg.addEventListener("pointermove", (event) => { if (dragging) place(event); });
  for (const end of ["pointerup", "pointercancel"]) {
    svg.addEventListener(end, () => { if (dragging) { dragging = false; view.settle(); } });
  }

  function key(event) {
    const [low, high] = current().range, step = (high - low) / 200, at = state.theta ?? endOf(current());
    const moves = { ArrowLeft: -step, ArrowDown: -step, ArrowRight: step, ArrowUp: step, PageDown: -10 * step, PageUp: 10 * step };
    const value = event.key in moves ? at + moves[event.key] : { Home: low, End: high }[event.key];
    if (value === undefined) return;
    view.set({ theta: Number(Math.min(high, Math.max(low, value)).toPrecision(4)) });
    view.settle();
    event.preventDefault();
  }

  /** Return the end of the axis on which no patch is an artifact. */
  function endOf({ side, range }) {
    return side === "low" ? range[0] : range[1];
  }

  function drawBars(width) {
    const { name, counts, range: [low, high], side, fitted } = current();
    const span = high - low || 1, inner = width - 24;
    toX = (value) => 12 + ((value - low) / span) * inner;
    fromX = (x) => Math.max(0, low + (Math.min(inner, Math.max(0, x - 12)) / inner) * span);
    const largest = Math.sqrt(Math.max(...counts)), bar = inner / counts.length;
    const bars = counts.map((count, i) => {
      const size = count ? Math.max(1.5, (Math.sqrt(count) / largest) * (floor - top)) : 0;
      return `M${(12 + i * bar).toFixed(2)} ${floor}v${-size.toFixed(2)}h${(0.9 * bar).toFixed(2)}V${floor}z`;
    }).join("");
    const parts = width < 480 ? 2 : 4;
    const ticks = Array.from({ length: parts + 1 }, (_, i) => low + (i / parts) * span).map((value, i) => make("text", {
      x: toX(value), y: floor + 16, "text-anchor": i === 0 ? "start" : i === parts ? "end" : "middle" }, number(value)));
    const mark = fitted === null ? [] : [make("path", { class: "fit", d: `M${toX(fitted)} ${floor}l-5 8h10z` })];
    const beyond = make("rect", { class: "beyond", y: top, height: floor - top });
    svg.replaceChildren(beyond, make("path", { class: "bars", d: bars }),
      make("line", { class: "axis", x1: 12, x2: width - 12, y1: floor, y2: floor }), ...ticks, ...mark, handle);
    handle.replaceChildren(make("rect", { class: "grip-area", x: -14, y: 0, width: 28, height: floor + 4 }),
      make("line", { y1: top - 4, y2: floor }), make("circle", { cy: top - 8, r: 8 }));
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("width", width);
    drawn = `${name} ${width} ${side}`;
  }

  function draw() {
    const now = current(), width = Math.max(240, Math.floor(sizeOf(svg.parentElement).width));
    if (drawn !== `${now.name} ${width} ${now.side}`) drawBars(width);
    const [low, high] = now.range, at = Math.min(high, Math.max(low, state.theta ?? endOf(now))), x = toX(at);
    handle.setAttribute("transform", `translate(${x.toFixed(1)} 0)`);
    const beyond = svg.querySelector(".beyond");
    beyond.setAttribute("x", now.side === "low" ? 12 : x);
    beyond.setAttribute("width", Math.max(0, now.side === "low" ? x - 12 : width - 12 - x));
    const part = shareBeyond(now, state.theta);
    for (const [key, value] of Object.entries({ valuemin: low, valuemax: high, valuenow: at,
      valuetext: `θ = ${number(state.theta)}, ${percent(part)} of the patches` })) handle.setAttribute(`aria-${key}`, value);
    if (document.activeElement !== theta || theta.valueAsNumber !== state.theta) theta.value = state.theta === null ? "" : Number(state.theta.toPrecision(7));
    if (document.activeElement !== alpha) alpha.value = state.alpha;
    source.select.value = state.source; edit.select.value = state.edit;
    alphaField.hidden = state.edit !== "scale";
    caption.textContent = `${now.words[0].toUpperCase()}${now.words.slice(1)}; the height is the square root of the count.`;
    share.textContent = state.theta === null ? "There is no θ, so no patch counts as an artifact: drag the handle." : `${percent(part)} of the sample's ${now.patches.toLocaleString("en")} patches have `
      + `${now.symbol} ${now.side === "low" ? "≤" : "≥"} θ: they count as artifacts.`;
    verdict.textContent = `The fit of two modes${now.fitted === null ? " finds no θ" : ` puts θ at ${number(now.fitted)} (▲)`}: ${now.verdict}.`
      + (state.edit === "substitute" ? " This edit replaces the artifacts' values, so the attention stays as it is." : "");
    back.hidden = view.isOfRun() || (view.kernel && !view.kernel.isLast());
    block.field.hidden = !view.kernel;
    if (view.kernel) block.select.value = view.kernel.block;
  }

  const element = make("section", { class: "theta-panel", "aria-label": "Threshold θ" },
    make("h3", {}, "Where is θ?"),
    make("div", { class: "controls" }, source.field, make("label", { class: "field" }, make("span", {}, "θ"), theta), edit.field, alphaField, block.field, back),
    make("div", { class: "plot" }, svg), caption, make("p", {}, share), verdict);
  return { element, draw };
}

// ---- Strip of images -------------------------------------------------------------------------------------------------

const ORDERS = { attention: "attention on artifacts", count: "number of artifacts", change: "change of feature" };

/** Return which images a kernel holds, in words. */
function sampleOf({ panel, live: { images, most, bytes } }) {
  return `${panel.numbers.filter((image) => image >= 0).length} of ${plural(images, "image")}, drawn at random: at most ${most}, and as many as fit into ${bytes / 2 ** 20} MiB of tokens.`;
}

function strip(view) {
  const { data, state } = view;
  const order = choice("Order", Object.entries(ORDERS), (value) => { view.set({ order: value }); view.settle(); });
  const list = make("div", { class: "strip", role: "group", "aria-label": "Images", onkeydown: moveFocus });
  const items = data.panel.numbers.map((image, place) => {
    const caption = make("span");
    const element = make("button", { type: "button", onclick: () => view.set({ image }) },
      make("img", { src: jpeg(data.panel.pictures[place]), alt: "", loading: "lazy" }), caption);
    return { element, caption, image, place };
  });

  function measure(item) {
    const start = item.place * data.patches, end = start + data.patches, { side } = view.source();
    const mask = artifactsOf(data.panel.statistics[state.source].subarray(start, end), state.theta, side);
    item.count = shareOn(mask, mask);
    item.attention = shareOn(data.panel.statistics.attention.subarray(start, end), mask);
    item.change = data.map.change[view.places.get(item.image)] ?? -1; // of an image of one's own
  }

  function draw() {
    for (const item of items) {
      measure(item);
      const change = item.change < 0 ? "unknown" : item.change.toFixed(3);
      const value = { attention: percent(item.attention), count: String(item.count), change }[state.order];
      const label = `${view.nameOf(item.image)}: ${plural(item.count, "artifact")}, ${ORDERS[state.order]} ${value}`;
      if (item.label === label) continue;
      item.label = label;
      item.caption.textContent = value;
      item.element.setAttribute("aria-label", label);
    }
    if (pressed !== state.image) {
      pressed = state.image;
      for (const { element, image } of items) element.setAttribute("aria-pressed", image === pressed);
      letIn(items.map(({ element }) => element), chosen().element);
      bringIntoView();
    }
    order.select.value = state.order;
    status.textContent = view.kernel ? view.kernel.words() : "";
  }

  /** Sort the images; not while θ is being dragged, because a strip that jumps can't be read. */
  function sort() {
    items.forEach(measure);
    const sorted = [...items].sort((a, b) => b[state.order] - a[state.order] || a.image - b.image);
    list.replaceChildren(...sorted.map(({ element }) => element));
    bringIntoView();
    return sorted[0].image;
  }

  const chosen = () => items.find(({ image }) => image === state.image);
  let pressed = null;

  function bringIntoView() {
    const { offsetLeft, offsetWidth } = chosen().element;
    const isSeen = offsetLeft >= list.scrollLeft && offsetLeft + offsetWidth <= list.scrollLeft + list.clientWidth;
    if (!isSeen) list.scrollLeft = offsetLeft - list.clientWidth / 2;
  }

  const about = make("p", { class: "hint" }, view.kernel ? sampleOf(data)
    : `${plural(items.length, "image")}${items.length < data.map.numbers.length ? " drawn at random" : ""}. The change of feature belongs to the run's θ.`);
  const file = make("input", { type: "file", accept: "image/*", onchange: () => { if (file.files.length) view.kernel.upload(file.files[0]); } });
  const own = view.kernel ? make("label", { class: "field" }, make("span", {}, "An image of your own"), file) : null;
  const status = make("p", { class: "hint kernel", role: "status" });
  const element = make("section", { class: "strip-panel", "aria-label": "Choice of the image" }, make("div", { class: "controls" }, order.field, own, about), list, status);
  return { element, draw, sort };
}

// ---- Map panel: the features as two linked scatter plots -------------------------------------------------------------

// Okabe and Ito's colours, and three shapes, so that 24 classes can be told apart.
const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8a8000", "#3b3b3b"];
const SHAPES = [
  (path, x, y, r) => path.arc(x, y, r, 0, 2 * Math.PI),
  (path, x, y, r) => path.rect(x - r, y - r, 2 * r, 2 * r),
  (path, x, y, r) => { path.moveTo(x, y - 1.3 * r); path.lineTo(x + 1.2 * r, y + r); path.lineTo(x - 1.2 * r, y + r); path.closePath(); },
];
const MOST_IN_SHEET = 120;

function mapPanel(view) {
  const { data: { map, panel }, state } = view, count = map.numbers.length, inPanel = new Set(panel.numbers);
  const titled = (...parts) => make("section", { class: "map-panel", "aria-label": "Map of the features" }, make("h3", {}, "What moves?"), ...parts);
  if (!map.points) return { element: titled(make("p", {}, "There is no map: it needs at least 4 images whose features differ.")), draw() {} };
  const names = ["Baseline", "ITAE"];
  const note = make("p", { class: "elsewhere", role: "status" });
  const sheet = make("div", { class: "sheet", role: "group", "aria-label": "Chosen images", onkeydown: moveFocus });
  const sheetTitle = make("p", { class: "summary", role: "status" }), detail = make("div", { class: "detail", "aria-live": "polite" });
  const legend = make("ul", { class: "legend", "aria-label": "Colours" });
  const tip = make("div", { class: "tip", "aria-hidden": "true", hidden: true });
  const sorts = [...(map.classes ? [["class", "class"]] : []), ["cluster", "cluster"]];
  const colour = choice("Colour", sorts, (value) => view.set({ colour: value }));
  let chosen = [], hovered = null, lasso = null, places = [[], []], drawn = "", listed = "", moved = [], compared = null;
  const again = () => { drawn = ""; view.redraw(); }; // θ alone does not change the map, and must not wait for it

  const canvases = map.points.map((_, side) => make("canvas", {
    role: "application", tabindex: 0, "aria-roledescription": "map of images", "aria-describedby": `${view.id}-map-keys`,
    "aria-label": `${names[side]}: map of ${count} images`,
    onpointerdown: (event) => { lasso = { side, path: [at(event)] }; event.currentTarget.setPointerCapture(event.pointerId); },
    onpointermove: (event) => move(event, side), onpointerup: (event) => release(event, side),
    onpointercancel: () => { lasso = null; again(); },
    onpointerleave: () => point(null, side), onkeydown: (event) => key(event, side), onblur: () => point(null, side),
  }));

  function at(event) {
    const box = event.currentTarget.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  }

  function nearest([x, y], side, within = 14) {
    let best = null, least = within ** 2;
    places[side].forEach(([px, py], i) => {
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < least) { least = distance; best = i; }
    });
    return best;
  }

  /** Show the image of a point, in both maps. */
  function point(i, side) {
    if (i === hovered) return;
    hovered = i;
    tip.hidden = i === null;
    if (i !== null) {
      tip.replaceChildren(make("img", { src: jpeg(map.pictures[i]), alt: "" }), make("span", {}, about(i)));
      const canvas = canvases[side], [x, y] = places[side][i], right = x > canvas.clientWidth / 2;
      const left = canvas.offsetLeft + x + (right ? -12 - tip.offsetWidth : 12);
      tip.style.left = `${Math.max(0, Math.min(left, tip.parentElement.clientWidth - tip.offsetWidth))}px`;
      tip.style.top = `${canvas.offsetTop + y + 12}px`;
    }
    again();
  }

  function move(event, side) {
    const spot = at(event);
    if (!lasso) return point(nearest(spot, side), side);
    lasso.path.push(spot);
    point(null, side);
    again();
  }

  function release(event, side) {
    if (!lasso) return;
    const { path } = lasso, [first] = path;
    lasso = null;
    const isClick = path.every(([x, y]) => Math.hypot(x - first[0], y - first[1]) < 5);
    if (isClick) {
      const i = nearest(at(event), side);
      if (i !== null) pick(i); else choose([]);
    } else choose(places[side].flatMap((spot, i) => (isInside(spot, path) ? [i] : [])));
  }

  function key(event, side) {
    const direction = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
    if (direction) {
      const from = places[side][hovered ?? placeOf(state.pick) ?? 0];
      const cost = ([x, y]) => {
        const along = (x - from[0]) * direction[0] + (y - from[1]) * direction[1];
        const aside = Math.abs((x - from[0]) * direction[1]) + Math.abs((y - from[1]) * direction[0]);
        return along > 0.5 ? along + 3 * aside : Infinity;
      };
      let best = null;
      places[side].forEach((spot, i) => { if (cost(spot) < (best === null ? Infinity : cost(places[side][best]))) best = i; });
      if (best !== null) point(best, side);
    } else if (event.key === "Enter" && hovered !== null) pick(hovered);
    else if (event.key === " " && hovered !== null) {
      choose(chosen.includes(hovered) ? chosen.filter((i) => i !== hovered) : [...chosen, hovered]);
    } else if (event.key === "Escape") choose([]);
    else return;
    event.preventDefault();
  }

  const placeOf = (image) => view.places.get(image) ?? null;
  const kind = (i, which = 0) => (state.colour === "class" ? map.classes[i] : map.clusters[which][i]);

  function about(i) {
    const [before, after] = map.clusters.map((each) => each[i]);
    return [view.nameOf(map.numbers[i]), before === after ? `cluster ${before}` : `cluster ${before} → ${after}`].join(", ");
  }

  function pick(i) {
    const image = map.numbers[i];
    if (!chosen.includes(i)) choose([i]);
    view.set({ pick: image, ...(inPanel.has(image) ? { image } : {}) });
  }

  function choose(places) {
    chosen = places;
    fillSheet();
    again();
  }

  function item(i, note = "") {
    return make("button", { type: "button", title: about(i), "aria-label": `${about(i)}${note && `, ${note}`}`, class: note,
      onclick: () => pick(i), onpointerenter: () => { hovered = i; again(); }, onpointerleave: () => { hovered = null; again(); } },
      make("img", { src: jpeg(map.pictures[i]), alt: "" }), ...(note ? [make("span", {}, note)] : []));
  }

  function fillSheet() {
    sheet.replaceChildren(...chosen.slice(0, MOST_IN_SHEET).map((i) => item(i)));
    letIn([...sheet.children]);
    const rest = chosen.length - MOST_IN_SHEET;
    sheetTitle.textContent = chosen.length === 0 ? "Drag a line around points to see their images, or click one."
      : `${plural(chosen.length, "image")}${rest > 0 ? `; the first ${MOST_IN_SHEET} are shown` : ""}.`;
  }

  function fillDetail() {
    const i = placeOf(state.pick);
    if (i === null) return detail.replaceChildren();
    const [before, after] = map.neighbours.map((each) => each[i]);
    const row = (title, list, other, mark) => make("div", { class: "neighbours" }, make("p", {}, title),
      make("div", { role: "group", "aria-label": title, onkeydown: moveFocus }, ...list.map((j) => item(j, other.includes(j) ? "" : mark))));
    detail.replaceChildren(make("div", { class: "picked" }, make("img", { src: jpeg(map.pictures[i]), alt: "" }),
      make("p", {}, make("strong", {}, about(i)), `. Change of feature ${map.change[i].toFixed(3)}. `
        + (inPanel.has(map.numbers[i]) ? "Its attention is shown above." : "Its attention is not in this page."))),
      row("Nearest neighbours before", before, after, "lost"), row("Nearest neighbours after", after, before, "gained"));
  }

  function drawMap(canvas, side) {
    const { context, width, height } = contextOf(canvas), points = map.points[side], margin = 12;
    const [xs, ys] = [0, 1].map((axis) => Array.from({ length: count }, (_, i) => points[2 * i + axis]));
    const limits = (values) => [Math.min(...values), Math.max(...values)], [x0, x1] = limits(xs), [y0, y1] = limits(ys);
    const factor = Math.min((width - 2 * margin) / (x1 - x0 || 1), (height - 2 * margin) / (y1 - y0 || 1));
    places[side] = xs.map((x, i) => [width / 2 + (x - (x0 + x1) / 2) * factor, height / 2 - (ys[i] - (y0 + y1) / 2) * factor]);
    const radius = width < 250 ? 2 : 3, some = chosen.length > 0, selected = new Set(chosen);
    places[side].forEach(([x, y], i) => {
      const each = kind(i, side);
      context.globalAlpha = some && !selected.has(i) ? 0.18 : 0.85;
      context.fillStyle = COLOURS[each % COLOURS.length];
      context.beginPath();
      SHAPES[Math.floor(each / COLOURS.length) % SHAPES.length](context, x, y, radius);
      context.fill();
    });
    context.globalAlpha = 1;
    const ring = (i, size, colour) => {
      context.beginPath(); context.arc(...places[side][i], size, 0, 2 * Math.PI);
      context.strokeStyle = "#fff"; context.lineWidth = 4; context.stroke();
      context.strokeStyle = colour; context.lineWidth = 2; context.stroke();
    };
    const picked = placeOf(state.pick);
    if (picked !== null) {
      context.strokeStyle = "#1b2430"; context.lineWidth = 1;
      for (const j of map.neighbours[side][picked]) {
        context.beginPath(); context.moveTo(...places[side][picked]); context.lineTo(...places[side][j]); context.stroke();
      }
      ring(picked, 7, "#d4351c");
    }
    if (hovered !== null) ring(hovered, 6, "#1b2430");
    if (lasso && lasso.side === side) {
      context.beginPath();
      lasso.path.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.strokeStyle = "#1b2430"; context.lineWidth = 1.5; context.setLineDash([4, 3]); context.stroke(); context.setLineDash([]);
    }
  }

  /** Take over what is told of the features, at first and when a kernel has computed others. */
  function compare() {
    moved = map.numbers.map((_, i) => i).filter((i) => map.clusters[0][i] !== map.clusters[1][i]);
    list.textContent = moved.length ? `List the ${plural(moved.length, "image")} whose cluster changed` : "No image changed its cluster";
    list.disabled = moved.length === 0;
    compared = map.change; drawn = ""; listed = "";
  }

  function draw() {
    if (compared !== map.change) compare();
    const looks = `${state.colour} ${state.pick} ${canvases.map((canvas) => sizeOf(canvas).width)} ${window.devicePixelRatio}`;
    if (drawn !== looks) { drawn = looks; canvases.forEach(drawMap); }
    colour.select.value = state.colour;
    const { source, theta, edit } = view.ofRun(), run = `the run's setting (${view.source(source)?.symbol ?? source}, θ = ${number(theta)}, ${edit})`;
    const text = view.kernel ? view.kernel.note(run) : view.isOfRun() ? "" : `Map, clusters and neighbours belong to ${run}. The handle is elsewhere.`;
    note.hidden = text === "";
    if (note.textContent !== text) note.textContent = text;
    if (listed !== `${state.colour} ${state.pick}`) { listed = `${state.colour} ${state.pick}`; fillLegend(); fillDetail(); }
  }

  function fillLegend() {
    const kinds = [...new Set(map.numbers.flatMap((_, i) => [kind(i, 0), kind(i, 1)]))].sort((a, b) => a - b);
    const most = COLOURS.length * SHAPES.length, signs = ["circle", "square", "triangle"];
    legend.replaceChildren(...kinds.slice(0, most).map((each) => make("li", {},
      make("span", { class: signs[Math.floor(each / COLOURS.length) % signs.length], style: `--colour: ${COLOURS[each % COLOURS.length]}` }),
      state.colour === "class" ? map.classNames[each] : `cluster ${each}`)),
      ...(kinds.length > most ? [make("li", {}, `and ${kinds.length - most} more, in the same colours`)] : []));
  }

  fillSheet();
  const list = button("", () => choose(moved));
  const plots = make("div", { class: "maps" }, ...canvases.map((canvas, i) => make("figure", {}, make("figcaption", {}, names[i]), canvas)), tip);
  const element = titled(make("div", { class: "controls" }, colour.field, list, button("Clear", () => choose([]))),
    note, plots, legend, sheetTitle, sheet, detail,
    make("p", { id: `${view.id}-map-keys`, class: "unseen" }, "Arrow keys move from point to point, Enter shows an image and its neighbours, Space adds it to the sheet, Escape clears."));
  return { element, draw };
}

/** Return whether a point lies inside a closed path: a ray from it crosses the path an odd number of times. */
function isInside([x, y], path) {
  let inside = false;
  path.forEach(([x1, y1], i) => {
    const [x0, y0] = path[(i + path.length - 1) % path.length];
    if (y0 > y !== y1 > y && x < x0 + ((y - y0) / (y1 - y0)) * (x1 - x0)) inside = !inside;
  });
  return inside;
}

// ---- Address and files -------------------------------------------------------------------------------------------------

const isIn = (...values) => (text) => (values.includes(text) ? text : undefined);
const whole = (text) => (/^\d+$/.test(text) ? Number(text) : undefined);
const real = (text) => (text !== "" && Number.isFinite(Number(text)) ? Number(text) : undefined);

/** How each part of the state is read from the address; undefined if it is not valid. */
function readersOf(data) {
  const below = (count) => (text) => (whole(text) < count ? whole(text) : undefined);
  const oneOf = (numbers) => (text) => (numbers.includes(whole(text)) ? whole(text) : undefined);
  return {
    image: oneOf(data.panel.numbers), pick: oneOf(data.map.numbers), patch: below(data.patches), head: below(data.heads),
    source: isIn(...data.sources.map(({ name }) => name)), theta: (text) => (text === "none" ? null : real(text) >= 0 ? real(text) : undefined),
    edit: isIn(...Object.keys(EDITS)), alpha: (text) => (real(text) > 0 && real(text) < 1 ? real(text) : undefined),
    scale: isIn("sqrt", "linear"), order: isIn(...Object.keys(ORDERS)), frames: (text) => ({ 0: false, 1: true })[text],
    colour: isIn(...(data.map.classes ? ["class"] : []), "cluster"),
  };
}

function stateFrom(address, data) {
  const given = new URLSearchParams(address.replace(/^#/, "")), state = {};
  for (const [name, read] of Object.entries(readersOf(data))) {
    const value = given.has(name) ? read(given.get(name)) : undefined;
    if (value !== undefined) state[name] = value;
  }
  return state;
}

/** Return the parts of the state that differ from the first ones, as an address. */
function addressOf(state, first) {
  const words = new URLSearchParams();
  for (const [name, value] of Object.entries(state)) {
    if (value === first[name]) continue;
    if (value === null && name !== "theta") continue;
    words.set(name, value === null ? "none" : typeof value === "boolean" ? Number(value) : value);
  }
  return `#${words}`;
}

function save(blob, name) {
  const link = make("a", { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** Save the image and its two maps side by side, with a line of words. */
function savePicture(view, { element, canvases }) {
  const size = Math.max(...canvases.map(({ width }) => width)), gap = Math.round(size / 20), line = Math.round(size / 12);
  const high = Math.round((size * view.data.rows) / view.data.columns);
  const sheet = make("canvas", { width: 3 * size + 4 * gap, height: high + 2 * gap + 2 * line });
  const context = sheet.getContext("2d");
  context.fillStyle = "#fff"; context.fillRect(0, 0, sheet.width, sheet.height);
  canvases.forEach((canvas, i) => context.drawImage(canvas, gap + i * (size + gap), gap, size, high));
  context.fillStyle = "#1b2430"; context.font = `${Math.round(line / 2)}px system-ui, sans-serif`;
  const { state } = view, words = `${view.source().symbol}, θ = ${number(state.theta)}, ${state.edit}${state.edit === "scale" ? ` with α = ${state.alpha}` : ""}`;
  context.fillText(element.querySelector(".summary").textContent, gap, sheet.height - gap - line, sheet.width - 2 * gap);
  context.fillText(words, gap, sheet.height - gap, sheet.width - 2 * gap);
  sheet.toBlob((blob) => save(blob, `itae-${state.image}.png`));
}

function saveState(view) {
  const { state, now } = view, { before, after, artifacts } = now;
  const content = { ...state, share: shareBeyond(view.source(), state.theta), before: [...before], after: [...after], artifacts: [...artifacts] };
  save(new Blob([`${JSON.stringify(content, null, 1)}\n`], { type: "application/json" }), `itae-${state.image}.json`);
}

// ---- A kernel behind the view ------------------------------------------------------------------------------------------

const REST = 300; // milliseconds without a change, after which θ has come to rest
const LARGEST_FILE = 8e6; // Jupyter's connection breaks at a message of 10 MiB

/** Return an error in reading an image without the remedy that only data sets have. */
const ofOneFile = (problem) => problem.replace("the image without a name", "this image").replace(/, or leave out unreadable files.*/, "");

/** Asks a kernel for what the data lacks, one thing at a time: another block, an image of one's own, features. */
class Kernel {
  constructor(model, data) {
    Object.assign(this, { model, data, block: data.live.blocks - 1, file: null, asked: null, wish: null, problem: "" });
    model.on("change:answer", () => this.receive(model.get("answer")));
  }

  attach(view) {
    this.view = view;
    this.ofRun ??= { ...view.data.map }; // what is told of the features of the run's setting
    this.told ??= this.setting(); // the setting whose features are told of
  }

  isLast() { return this.block === this.data.live.blocks - 1; }

  setting() { const { source, theta, edit, alpha } = this.view.state; return JSON.stringify({ source, theta, edit, alpha }); }

  /** Wish for another block, or for an image of one's own. */
  want(wish) {
    this.wish = { block: this.block, file: this.file, ...wish };
    this.view.redraw();
  }

  async upload(file) {
    this.problem = file.size > LARGEST_FILE ? `${file.name} is larger than ${LARGEST_FILE / 1e6} MB: choose a smaller file` : "";
    if (!this.problem) this.want({ file: { name: file.name, bytes: await file.arrayBuffer() } });
    this.view.redraw();
  }

  /** Ask for what is lacking, unless an answer is awaited. */
  follow() {
    clearTimeout(this.rest);
    const setting = this.setting(), isTold = !this.isLast() || this.told === setting;
    if (this.asked) return;
    if (this.wish) this.ask({ block: this.wish.block }, this.wish);
    else if (!isTold && this.view.isOfRun()) this.tell(this.ofRun, setting);
    else if (!isTold) this.rest = setTimeout(() => this.ask({ setting: JSON.parse(setting) }, null, setting), REST);
  }

  ask(content, wish, setting = null) {
    const request = `${this.view.id} ${performance.now()}`;
    this.asked = { request, wish, setting };
    this.problem = "";
    this.model.send({ request, ...content }, undefined, wish?.file ? [wish.file.bytes] : []);
    this.view.redraw();
  }

  receive(answer) {
    if (answer.request !== this.asked?.request) return; // it is for another view of the widget
    const { wish, setting } = this.asked, isNew = wish && wish.file !== this.file;
    this.asked = null;
    if (wish === this.wish) this.wish = null;
    if (answer.problem) this.problem = isNew ? `${wish.file.name}: ${ofOneFile(answer.problem)}` : answer.problem;
    if (wish && !answer.problem) this.show(answer, wish, isNew);
    if (setting) this.tell(answer.problem ? {} : { ...answer, change: numbersOf(answer.change) }, setting);
    this.view.redraw();
  }

  /** Take over clusters, neighbours and change of other features. */
  tell({ clusters, neighbours, change }, setting) {
    if (change) Object.assign(this.view.data.map, { clusters, neighbours, change });
    this.told = setting;
    if (this.view.state.order === "change") this.view.settle();
    this.view.redraw();
  }

  /** Show another block, or an image of one's own, in a new view with the state of this one. */
  show({ block, sources, panel, own }, { file }, isNew) {
    const { state, data: { map }, root } = this.view, selects = () => [...root.querySelectorAll("select")];
    const focus = selects().indexOf(document.activeElement);
    const { threshold, name: source } = sources.find(({ name }) => name === state.source) ?? sources[0];
    const kept = { ...state, ...(isNew ? { image: -1 } : {}), ...(block === this.block ? {} : { source, theta: threshold }) };
    Object.assign(this, { block, file });
    this.view.sizes.disconnect();
    const fresh = decoded({ ...this.data, sources, panel: { ...panel, pictures: this.data.panel.pictures } });
    if (own) addImage(fresh.panel, own);
    new View({ ...fresh, map, upload: file?.name }, root, false, this, kept);
    selects()[focus]?.focus();
  }

  /** Return what is to be said of block and image. */
  words() { return this.asked?.wish ? "The kernel is at work …" : this.problem && `${this.problem}.`; }

  /** Return what is to be said of the features, given the run's setting in words; nothing if they are those of the run. */
  note(run) {
    if (!this.isLast()) return `Map, clusters and neighbours belong to the last block, and to ${run}. Block ${this.block + 1} is shown above.`;
    if (this.told !== this.setting()) return "The kernel computes the features of this setting …";
    if (this.problem) return `Clusters, neighbours and change are not those of this setting: ${this.problem}.`;
    return this.view.isOfRun() ? "" : `Clusters, neighbours and change of feature are those of this setting. The places on the map belong to ${run}.`;
  }
}

// ---- The view ------------------------------------------------------------------------------------------------------------

class View {
  constructor(data, root, address, kernel = null, kept = null) {
    const places = new Map(data.map.numbers.map((each, i) => [each, i])); // on the map, by number
    const id = `itae-${Math.random().toString(36).slice(2)}`; // a page may have several views
    Object.assign(this, { data, root, address, kernel, places, id, hovered: null, now: null, frame: null });
    const { source, theta, edit, alpha } = data.run;
    this.first = { image: data.panel.numbers[0], source, theta, edit, alpha, head: null, patch: null, scale: "sqrt", frames: true,
      order: "attention", colour: data.map.classes ? "class" : "cluster", pick: null };
    this.state = { ...this.first };
    this.thetas = {}; // of the statistics that are not chosen now
    this.images = imagePanel(this); this.theta = thetaPanel(this); this.strip = strip(this); this.map = mapPanel(this);
    this.first.image = this.state.image = this.strip.sort();
    if (kept) { Object.assign(this.state, kept); this.settle(); }
    if (kernel) kernel.attach(this);
    const buttons = make("div", { class: "buttons" }, button("Save as PNG", () => savePicture(this, this.images)),
      button("Save the state as JSON", () => saveState(this)));
    root.replaceChildren(this.strip.element, this.images.element, this.theta.element, buttons, this.map.element);
    if (address) {
      this.seen = location.hash; // an address that is not this one was given by the reader, and its event will come
      this.set(stateFrom(location.hash, data)); this.settle();
      window.addEventListener("hashchange", () => {
        const given = stateFrom(location.hash, data);
        this.seen = location.hash;
        if (Object.keys(given).length || location.hash.length < 2) this.set({ ...this.first, ...given }); // else a section
      });
    }
    this.sizes = watchSizes(root.querySelectorAll("canvas, .plot"), () => this.redraw());
    this.redraw();
  }

  source(name = this.state.source) { return this.data.sources.find((source) => source.name === name); }

  ofRun() { const { source, theta, edit, alpha } = this.first; return { source, theta, edit, alpha }; }

  isOfRun() { return Object.entries(this.ofRun()).every(([name, value]) => this.state[name] === value || (name === "alpha" && this.state.edit !== "scale")); }

  /** Return an image's name: its file if it has one, its number and its class. */
  nameOf(image) {
    const { map } = this.data, i = this.places.get(image);
    if (i === undefined) return this.data.upload;
    const name = map.names ? map.names[i] : `Image ${image}`;
    return map.classes ? `${name} (${map.classNames[map.classes[i]]})` : name;
  }

  /** Change to another statistic, and to the θ that it had, or that its fit found. */
  chooseSource(name) {
    this.thetas[this.state.source] = this.state.theta;
    this.set({ source: name, theta: name in this.thetas ? this.thetas[name] : this.source(name).threshold });
    this.settle();
  }

  set(changes) {
    if ("source" in changes && !("theta" in changes) && changes.source !== this.state.source) changes.theta = this.source(changes.source).threshold;
    Object.assign(this.state, changes);
    this.redraw();
  }

  /** Sort the strip again, after θ has come to rest. */
  settle() { this.strip.sort(); }

  /** Draw everything once, before the next picture of the browser. */
  redraw() { this.frame ??= requestAnimationFrame(() => { this.frame = null; this.draw(); }); }

  draw() {
    const { data, state } = this, place = data.panel.numbers.indexOf(state.image), start = place * data.patches;
    const values = data.panel.statistics[state.source].subarray(start, start + data.patches);
    const artifacts = artifactsOf(values, state.theta, this.source().side);
    this.now = { place, artifacts, ...attention(data, place, state.head, artifacts, state.edit, state.alpha) };
    if (this.kernel) this.kernel.follow();
    for (const part of [this.images, this.theta, this.strip, this.map]) part.draw();
    const address = addressOf(state, this.first);
    if (this.address && location.hash === this.seen && address !== (location.hash || "#")) {
      history.replaceState(null, "", address === "#" ? location.pathname + location.search : address);
      this.seen = location.hash;
    }
    performance.mark("itae-drawn");
  }
}

/** Show the view in an element; the form that anywidget accepts. `model.get` gives "data", and "address" in a page. */
function render({ model, el }) {
  const data = model.get("data"), kernel = data.live ? new Kernel(model, data) : null;
  el.classList.add("itae-explorer");
  if (kernel) { el.classList.add("live"); el.dataset.lmSuppressShortcuts = "true"; } // so that JupyterLab leaves the keys alone
  new View(decoded(data), el, Boolean(model.get("address")), kernel);
}

/** Show the view in a page without a kernel: the model is the data itself. */
function mount(data) {
  // The address is that of the report's page; in JupyterLab it belongs to others.
  const values = { data, address: document.body.classList.contains("notebook") }, listeners = [];
  const model = {
    get: (name) => values[name], on: (event, listener) => listeners.push([event, listener]), save_changes() {},
    set(name, value) { values[name] = value; for (const [event, listener] of listeners) if (event === `change:${name}`) listener(); },
  };
  render({ model, el: document.querySelector(".itae-explorer > .missing").parentElement }); // the first that waits
}

export default { render };
