/**
 * The views of anomaly_detection's dashboards: viewer, board, gallery.
 *
 * One function a view, `view(element, state)`: it fills the element, follows the state and returns
 * a function that stops it. The state has get(name), set(name, value), save_changes(), on(event,
 * callback), off(event, callback) and send(message): a Jupyter widget model has them, and `Store`
 * is the same without a kernel, for the report. What the names mean stands in nbs/40_viewer.ipynb.
 */

export const CELLS = {
  all: "all",
  missed: "missed",
  false_alarm: "false alarms",
  found: "found",
  passed: "passed",
  unknown: "unknown",
  held_out: "held out",
};
// Okabe and Ito's colours, as in the static figures
const BLUE = "#0072B2", VERMILION = "#D55E00", GREEN = "#009E73", GREY = "#666666";
const MODES = ["overlay", "map", "image"];
// Below this share of the scale the overlay shows nothing; from RAMP_END on it is at full opacity
const RAMP_START = 0.2, RAMP_END = 0.7;
const PAGE = 24;

// ---------------------------------------------------------------- state

/** The state of a page without a kernel; `answer(message)` stands for what the kernel would do. */
export class Store {
  constructor(values, answer = () => {}) {
    this.values = { ...values };
    this.listeners = new Map();
    this.answer = answer;
  }
  get(name) {
    return this.values[name];
  }
  set(name, value) {
    if (Object.is(this.values[name], value)) return;
    this.values[name] = value;
    this.emit(`change:${name}`);
  }
  save_changes() {}
  send(message) {
    this.answer(message);
  }
  on(event, callback) {
    this.listeners.set(event, [...(this.listeners.get(event) ?? []), callback]);
  }
  off(event, callback) {
    this.listeners.set(event, (this.listeners.get(event) ?? []).filter((c) => c !== callback));
  }
  emit(event, ...details) {
    for (const callback of this.listeners.get(event) ?? []) callback(...details);
  }
}

/** Change the state here, and in the kernel where there is one. */
function change(state, values) {
  for (const [name, value] of Object.entries(values)) state.set(name, value);
  state.save_changes();
}

/** Call back on a change of any of the names; returns the function that ends it. */
function follow(state, names, callback) {
  for (const name of names) state.on(`change:${name}`, callback);
  return () => names.forEach((name) => state.off(`change:${name}`, callback));
}

/** Several calls before the next frame paint once. */
function onceAFrame(paint) {
  let waiting = 0;
  const ask = () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      paint();
    });
  };
  ask.stop = () => cancelAnimationFrame(waiting);
  return ask;
}

const decoded = new WeakMap();

/** Bytes as a typed array; the same bytes are decoded once. */
function numbers(bytes, Type) {
  if (!bytes || !bytes.byteLength) return new Type(0);
  if (!decoded.has(bytes)) {
    const start = bytes.byteOffset ?? 0;
    const buffer = bytes.buffer ?? bytes;
    decoded.set(bytes, new Type(buffer.slice(start, start + bytes.byteLength)));
  }
  return decoded.get(bytes);
}

/** The image threshold as the scores' own type has it: scores of float32 are compared in float32. */
function imageThreshold(state) {
  const value = state.get("threshold");
  return state.get("score_type") === "float32" ? Math.fround(value) : value;
}

/** What the confusion cells follow from, beside the threshold. */
const TRUTH = ["scores", "score_type", "labels", "held_out"];

/** The confusion cell of every row at the current threshold. */
export function cellsOf(state) {
  const scores = numbers(state.get("scores"), Float64Array);
  const labels = numbers(state.get("labels"), Int8Array);
  const heldOut = numbers(state.get("held_out"), Uint8Array);
  const threshold = imageThreshold(state);
  return Array.from(scores, (score, row) => {
    if (heldOut[row]) return "held_out";
    if (labels[row] < 0) return "unknown";
    const flagged = score > threshold;
    if (labels[row]) return flagged ? "found" : "missed";
    return flagged ? "false_alarm" : "passed";
  });
}

/** How many rows each cell has. */
export function countCells(state) {
  const counts = Object.fromEntries(Object.keys(CELLS).map((name) => [name, 0]));
  for (const cell of cellsOf(state)) {
    counts[cell] += 1;
    counts.all += 1;
  }
  return counts;
}

/** The rows of the chosen cell in the chosen order; the gallery shows them, the keys walk them. */
export function listedRows(state) {
  const scores = numbers(state.get("scores"), Float64Array);
  const chosen = state.get("cell");
  const cells = cellsOf(state);
  const rows = [...scores.keys()].filter((row) => chosen === "all" || cells[row] === chosen);
  const threshold = imageThreshold(state);
  const kinds = state.get("defect_types");
  const keys = {
    row: (a, b) => a - b,
    score: (a, b) => scores[b] - scores[a],
    margin: (a, b) => Math.abs(scores[a] - threshold) - Math.abs(scores[b] - threshold),
    "defect type": (a, b) =>
      kinds[a] < kinds[b] ? -1 : kinds[a] > kinds[b] ? 1 : scores[b] - scores[a],
  };
  const compare = keys[state.get("order")] ?? keys.row;
  const sign = state.get("reverse") ? -1 : 1;
  // Infinite scores differ by NaN, which counts as equal
  return rows.sort((a, b) => sign * (compare(a, b) || 0) || a - b);
}

/** A number in four digits. */
function short(value) {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "-∞";
  const size = Math.abs(value);
  return size !== 0 && (size < 1e-3 || size >= 1e6) ? value.toExponential(3) : `${+value.toPrecision(4)}`;
}

/** An element with properties, inside a parent. */
function make(tag, properties, parent) {
  const element = document.createElement(tag);
  Object.assign(element, properties);
  parent?.append(element);
  return element;
}

/** An SVG element with attributes, inside a parent. */
function draw(tag, attributes, parent) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  const { text, ...rest } = attributes;
  for (const [name, value] of Object.entries(rest)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  parent?.append(element);
  return element;
}

// ---------------------------------------------------------------- viewer

/** Whether map values lie above the pixel threshold, compared in float32 as in the kernel. */
function aboveThreshold(state) {
  const values = numbers(state.get("item").map, Float32Array);
  const threshold = Math.fround(state.get("pixel_threshold"));
  const above = new Uint8Array(values.length);
  let count = 0;
  for (let i = 0; i < values.length; i += 1) {
    if (values[i] > threshold) {
      above[i] = 1;
      count += 1;
    }
  }
  return { above, count };
}

/** The map's colours as (h, w) pixels; the overlay's calm parts are transparent. */
function heatPixels(state, width, height) {
  const values = numbers(state.get("item").map, Float32Array);
  const colours = numbers(state.get("colour_maps")[state.get("colour_map")], Uint8Array);
  const [low, high] = state.get("scale");
  const overlay = state.get("mode") === "overlay";
  const opacity = overlay ? state.get("opacity") : 1;
  const pixels = new Uint8ClampedArray(4 * width * height);
  const factor = 1 / (high - low);
  for (let i = 0; i < values.length; i += 1) {
    const share = Math.min(1, Math.max(0, (values[i] - low) * factor));
    const colour = 3 * Math.min(255, Math.floor(share * 256));
    const shown = Math.min(1, Math.max(0, (share - RAMP_START) / (RAMP_END - RAMP_START)));
    pixels[4 * i] = colours[colour];
    pixels[4 * i + 1] = colours[colour + 1];
    pixels[4 * i + 2] = colours[colour + 2];
    pixels[4 * i + 3] = 255 * (overlay ? opacity * shown : 1);
  }
  return new ImageData(pixels, width, height);
}

/** Outline the set pixels of `inside` on the canvas's own pixels: colour inside, black outside. */
function outlinePixels(target, inside, columns, lines, width, colour) {
  const [wide, high] = [columns.length, lines.length];
  for (let y = 0; y < high; y += 1) {
    const here = lines[y] * width;
    const up = lines[Math.max(0, y - 1)] * width;
    const down = lines[Math.min(high - 1, y + 1)] * width;
    for (let x = 0; x < wide; x += 1) {
      const column = columns[x];
      const own = inside[here + column];
      const left = inside[here + columns[x ? x - 1 : 0]];
      const right = inside[here + columns[x + 1 < wide ? x + 1 : x]];
      const above = inside[up + column], below = inside[down + column];
      if (own + left + right + above + below === 5 * own) continue;
      const [red, green, blue] = own ? colour : [0, 0, 0];
      const at = 4 * (y * wide + x);
      target[at] = red;
      target[at + 1] = green;
      target[at + 2] = blue;
      target[at + 3] = 255;
    }
  }
}

/** One image under its anomaly map: colours, contour, truth, zoom, value under the pointer, keys. */
export function viewer(element, state) {
  const root = make("div", { className: "ad-viewer ad-view", tabIndex: 0 }, element);
  // JupyterLab's own keys (m, c and others change cells) rest while this has the focus
  root.dataset.lmSuppressShortcuts = "true";
  const caption = make("div", { className: "ad-caption" }, root);
  const canvas = make("canvas", { className: "ad-canvas" }, root);
  const status = make("div", { className: "ad-status" }, root);
  const bar = make("canvas", { className: "ad-bar", width: 256, height: 14 }, root);
  const ends = make("div", { className: "ad-ends" }, root);
  make("div", { className: "ad-hint", textContent:
    "keys: ← → image · ↑ ↓ opacity · m mode · c contour · g truth · + − 0 zoom · wheel, drag" }, root);
  const heat = document.createElement("canvas");
  const lines = document.createElement("canvas");
  let photo = null, photoOf = null, pointer = null, drag = null, painted = 0;

  const size = () => state.get("item").size ?? [1, 1];

  /** The part of the map that shows: left, top, width, height in map pixels. */
  function window_() {
    const [height, width] = size();
    const zoom = Math.max(1, state.get("zoom"));
    const [wide, high] = [width / zoom, height / zoom];
    const [x, y] = state.get("centre") ?? [width / 2, height / 2];
    const left = Math.min(width - wide, Math.max(0, x - wide / 2));
    const top = Math.min(height - high, Math.max(0, y - high / 2));
    return [left, top, wide, high];
  }

  async function loadPhoto() {
    const item = state.get("item");
    if (!item.image || photoOf === item.image) return;
    photoOf = item.image;
    const loaded = await createImageBitmap(new Blob([item.image]));
    if (photoOf !== item.image) return;
    photo = loaded;
    ask();
  }

  function paintCaption(item) {
    // A difference of two maps has no verdict
    if (state.get("caption")) {
      caption.textContent = `${state.get("caption")} · ${item.name}`;
      return;
    }
    const cell = cellsOf(state)[state.get("row")];
    const names = { missed: "MISSED", false_alarm: "FALSE ALARM", unknown: "unknown truth" };
    caption.replaceChildren();
    const badge = make("b", { textContent: names[cell] ?? CELLS[cell] ?? "" }, caption);
    const wrong = cell === "missed" || cell === "false_alarm";
    badge.style.color = wrong ? VERMILION : cell === "found" || cell === "passed" ? BLUE : GREY;
    const score = short(item.score);
    const parts = [item.name, item.defect_type, `score ${score}`, item.note];
    make("span", { textContent: ` ${parts.filter(Boolean).join(" · ")}` }, caption);
    if (state.get("title")) make("i", { textContent: ` ${state.get("title")}` }, caption);
  }

  function paintStatus(count) {
    const [height, width] = size();
    const threshold = short(state.get("pixel_threshold"));
    let text = `${count} of ${height * width} pixels above ${threshold}`;
    if (pointer) {
      const [x, y] = pointer;
      const value = numbers(state.get("item").map, Float32Array)[y * width + x];
      text = `x ${x}, y ${y}: ${short(value)} · ${text}`;
    }
    status.textContent = text;
  }

  function paintBar() {
    const context = bar.getContext("2d");
    const colours = numbers(state.get("colour_maps")[state.get("colour_map")], Uint8Array);
    const pixels = context.createImageData(256, 14);
    for (let i = 0; i < 256 * 14; i += 1) {
      const colour = 3 * (i % 256);
      pixels.data.set([colours[colour], colours[colour + 1], colours[colour + 2], 255], 4 * i);
    }
    context.putImageData(pixels, 0, 0);
    const [low, high] = state.get("scale");
    const at = (256 * (state.get("pixel_threshold") - low)) / (high - low);
    context.fillStyle = "black";
    context.fillRect(at - 2, 0, 4, 14);
    context.fillStyle = "white";
    context.fillRect(at - 1, 0, 2, 14);
    ends.replaceChildren();
    for (const text of [short(low), state.get("scale_rule"), short(high)]) {
      make("span", { textContent: text }, ends);
    }
  }

  /** Contour and truth, on the canvas's own pixels, so that their lines stay thin at any zoom. */
  function paintLines(context, above) {
    const [height, width] = size();
    const [left, top, wide, high] = window_();
    [lines.width, lines.height] = [canvas.width, canvas.height];
    const inner = lines.getContext("2d");
    const image = inner.createImageData(canvas.width, canvas.height);
    const index = (count, start, span, limit) =>
      Uint32Array.from({ length: count }, (_, i) =>
        Math.min(limit - 1, Math.floor(start + ((i + 0.5) * span) / count)));
    const columns = index(canvas.width, left, wide, width);
    const rows = index(canvas.height, top, high, height);
    const mask = numbers(state.get("item").mask, Uint8Array);
    if (state.get("show_truth") && mask.length) {
      outlinePixels(image.data, mask, columns, rows, width, [0, 255, 170]);
    }
    if (state.get("show_contour")) {
      outlinePixels(image.data, above, columns, rows, width, [255, 255, 255]);
    }
    inner.putImageData(image, 0, 0);
    context.drawImage(lines, 0, 0);
  }

  function paintBoxes(context) {
    const [left, top, wide] = window_();
    const factor = canvas.width / wide;
    for (const box of state.get("boxes") ?? []) {
      if (box.row !== undefined && box.row !== null && box.row !== state.get("row")) continue;
      const [x, y] = [(box.left - left) * factor, (box.top - top) * factor];
      const [w, h] = [box.width * factor, box.height * factor];
      context.lineWidth = 4;
      context.strokeStyle = "black";
      context.strokeRect(x, y, w, h);
      context.lineWidth = 2;
      context.strokeStyle = box.colour ?? "#56B4E9";
      context.strokeRect(x, y, w, h);
      if (!box.text) continue;
      context.font = `bold ${Math.round(canvas.width / 36)}px sans-serif`;
      context.lineWidth = 3;
      context.strokeStyle = "black";
      context.strokeText(box.text, x + 3, y - 4);
      context.fillStyle = box.colour ?? "#56B4E9";
      context.fillText(box.text, x + 3, y - 4);
    }
  }

  function paint() {
    const item = state.get("item");
    if (!item.size) return;
    loadPhoto();
    const [height, width] = size();
    const wide = state.get("width");
    const ratio = window.devicePixelRatio || 1;
    const backing = [Math.round(wide * ratio), Math.round((wide * ratio * height) / width)];
    if (canvas.width !== backing[0] || canvas.height !== backing[1]) {
      [canvas.width, canvas.height] = backing;
      canvas.style.width = `${wide}px`;
      root.style.width = `${wide}px`;
    }
    const context = canvas.getContext("2d");
    const [left, top, w, h] = window_();
    const smooth = state.get("zoom") < 4;
    context.imageSmoothingEnabled = smooth;
    context.fillStyle = "#c8c8c8";
    context.fillRect(0, 0, ...backing);
    const mode = state.get("mode");
    if (photo && mode !== "map") {
      // A small picture in place of the real one has fewer pixels than the map
      const [fx, fy] = [photo.width / width, photo.height / height];
      context.drawImage(photo, left * fx, top * fy, w * fx, h * fy, 0, 0, ...backing);
    }
    const hasMap = item.map && item.map.byteLength > 0;
    let marked = { above: new Uint8Array(width * height), count: 0 };
    if (hasMap) {
      marked = aboveThreshold(state);
      if (mode !== "image") {
        [heat.width, heat.height] = [width, height];
        heat.getContext("2d").putImageData(heatPixels(state, width, height), 0, 0);
        context.drawImage(heat, left, top, w, h, 0, 0, ...backing);
      }
    }
    if (state.get("show_contour") || state.get("show_truth")) paintLines(context, marked.above);
    paintBoxes(context);
    paintCaption(item);
    paintStatus(marked.count);
    paintBar();
    // What a test waits for: the row that is on the screen, and how often it was painted
    painted += 1;
    root.dataset.row = item.row;
    root.dataset.painted = painted;
    root.dataset.above = marked.count;
    root.classList.toggle("ad-waiting", item.row !== state.get("row"));
  }
  const ask = onceAFrame(paint);

  /** The map pixel under an event. */
  function pixelAt(event) {
    const [height, width] = size();
    const box = canvas.getBoundingClientRect();
    const [left, top, wide, high] = window_();
    const x = Math.floor(left + ((event.clientX - box.left) / box.width) * wide);
    const y = Math.floor(top + ((event.clientY - box.top) / box.height) * high);
    return [Math.min(width - 1, Math.max(0, x)), Math.min(height - 1, Math.max(0, y))];
  }

  function zoomBy(factor, at) {
    const [height, width] = size();
    const [left, top, wide, high] = window_();
    const [x, y] = at ?? [left + wide / 2, top + high / 2];
    const old = Math.max(1, state.get("zoom"));
    const zoom = Math.min(32, Math.max(1, old * factor));
    // The point under the pointer stays where it is
    const centre = [
      x + (left + wide / 2 - x) * (old / zoom), y + (top + high / 2 - y) * (old / zoom)];
    change(state, { zoom, centre: zoom === 1 ? [width / 2, height / 2] : centre });
  }

  function step(by) {
    const rows = listedRows(state);
    const at = rows.indexOf(state.get("row"));
    const next = at < 0 ? 0 : Math.min(rows.length - 1, Math.max(0, at + by));
    if (rows.length) change(state, { row: rows[next] });
  }

  function next(name, values) {
    change(state, { [name]: values[(values.indexOf(state.get(name)) + 1) % values.length] });
  }

  const opacityBy = (by) => {
    const value = Math.round(10 * (state.get("opacity") + by)) / 10;
    change(state, { opacity: Math.min(1, Math.max(0, value)) });
  };
  const wholeImage = () => change(state, { zoom: 1, centre: [size()[1] / 2, size()[0] / 2] });
  const keys = {
    ArrowRight: () => step(1),
    ArrowLeft: () => step(-1),
    ArrowUp: () => opacityBy(0.1),
    ArrowDown: () => opacityBy(-0.1),
    m: () => next("mode", MODES),
    c: () => next("show_contour", [true, false]),
    g: () => next("show_truth", [true, false]),
    "+": () => zoomBy(1.5),
    "-": () => zoomBy(1 / 1.5),
    0: wholeImage,
  };
  root.addEventListener("keydown", (event) => {
    const action = keys[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    action();
  });
  canvas.addEventListener("wheel", (event) => {
    // Without the focus the wheel scrolls the page
    if (document.activeElement !== root) return;
    event.preventDefault();
    zoomBy(event.deltaY < 0 ? 1.25 : 0.8, pixelAt(event));
  }, { passive: false });
  canvas.addEventListener("pointerdown", (event) => {
    root.focus({ preventScroll: true });
    canvas.setPointerCapture(event.pointerId);
    const [left, top, wide, high] = window_();
    drag = { x: event.clientX, y: event.clientY, moved: false,
      centre: [left + wide / 2, top + high / 2] };
  });
  canvas.addEventListener("pointermove", (event) => {
    pointer = pixelAt(event);
    if (drag) {
      const [dx, dy] = [event.clientX - drag.x, event.clientY - drag.y];
      drag.moved ||= Math.hypot(dx, dy) > 4;
      if (drag.moved && state.get("zoom") > 1) {
        const factor = window_()[2] / canvas.getBoundingClientRect().width;
        change(state, { centre: [drag.centre[0] - dx * factor, drag.centre[1] - dy * factor] });
      }
    }
    ask();
  });
  canvas.addEventListener("pointerup", (event) => {
    if (drag && !drag.moved) {
      const [x, y] = pixelAt(event);
      state.send({ kind: "click", row: state.get("item").row, x, y });
    }
    drag = null;
  });
  canvas.addEventListener("pointerleave", () => {
    pointer = null;
    ask();
  });
  canvas.addEventListener("dblclick", wholeImage);
  // The colour bar is a threshold for pixels that can be dragged
  let barDragged = false;
  const moveBar = (event) => {
    const box = bar.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const [low, high] = state.get("scale");
    change(state, { pixel_threshold: low + share * (high - low) });
  };
  bar.addEventListener("pointerdown", (event) => {
    root.focus({ preventScroll: true });
    bar.setPointerCapture(event.pointerId);
    barDragged = true;
    moveBar(event);
  });
  bar.addEventListener("pointermove", (event) => barDragged && moveBar(event));
  for (const end of ["pointerup", "pointercancel"]) {
    bar.addEventListener(end, () => { barDragged = false; });
  }

  const stop = follow(state, [...TRUTH, "item", "row", "threshold", "pixel_threshold", "opacity",
    "mode", "colour_map", "colour_maps", "scale", "scale_rule", "zoom", "centre", "show_contour",
    "show_truth", "boxes", "width", "title", "caption"], ask);
  ask();
  return () => {
    stop();
    ask.stop();
  };
}

// ---------------------------------------------------------------- board

const BOARD = { width: 660, left: 130, right: 120, strip: 46, bins: 60 };

/** Counts and ratios of the images at the current threshold; a ratio is null where undefined. */
export function imageMetrics(state) {
  const cells = countCells(state);
  return ratios(cells.found, cells.false_alarm, cells.missed, cells.passed);
}

function ratios(tp, fp, fn, tn) {
  const over = (a, b) => (b ? a / b : null);
  return {
    tp, fp, fn, tn,
    precision: over(tp, tp + fp),
    recall: over(tp, tp + fn),
    f1: tp + fn ? (2 * tp) / (2 * tp + fp + fn) : null,
    false_alarm_rate: over(fp, fp + tn),
    iou: over(tp, tp + fp + fn),
  };
}

/** The table's columns as arrays, from the lowest level up. */
function pixelTable(state) {
  const table = state.get("pixel_table");
  if (!table || !table.level) return null;
  const columns = { level: numbers(table.level, Float32Array) };
  for (const name of ["normal", "anomalous", "weight", "held_out"]) {
    columns[name] = numbers(table[name], Float64Array);
  }
  return { ...table, ...columns, region_max: numbers(table.region_max, Float32Array) };
}

/** The place of the level nearest to a threshold. */
function nearestLevel(levels, threshold) {
  let [low, high] = [0, levels.length - 1];
  while (low < high) {
    const middle = (low + high) >> 1;
    if (levels[middle] < threshold) low = middle + 1;
    else high = middle;
  }
  const below = low > 0 && threshold - levels[low - 1] < levels[low] - threshold;
  return below ? low - 1 : low;
}

/** Counts and ratios of the pixels; `exact` is false between the table's levels. */
export function pixelMetrics(state) {
  const table = pixelTable(state);
  const threshold = Math.fround(state.get("pixel_threshold"));
  const at = nearestLevel(table.level, threshold);
  const known = state.get("pixel_exact") ?? {};
  const fromKernel = known.threshold !== undefined && Math.fround(known.threshold) === threshold;
  const source = fromKernel ? known
    : { normal: table.normal[at], anomalous: table.anomalous[at], weight: table.weight[at] };
  const { n_normal: normal, n_anomalous: anomalous } = table;
  const result = ratios(source.anomalous, source.normal, anomalous - source.anomalous,
    normal - source.normal);
  result.exact = fromKernel || table.level[at] === threshold;
  result.region_recall = table.n_regions ? source.weight / table.n_regions : null;
  result.n_regions = table.n_regions;
  result.regions_found = table.region_max.reduce((sum, top) => sum + (top > threshold), 0);
  return result;
}

/** Bars of the scores: one strip a group with its counts. */
function imageStrips(state) {
  const scores = numbers(state.get("scores"), Float64Array);
  const group = numbers(state.get("group"), Uint8Array);
  const finite = scores.filter(Number.isFinite);
  const lowest = finite.reduce((a, b) => Math.min(a, b), Infinity);
  const highest = finite.reduce((a, b) => Math.max(a, b), -Infinity);
  const [low, high] = finite.length ? [lowest, highest] : [0, 1];
  const margin = 0.04 * (high - low || 1);
  const range = [low - margin, high + margin];
  const strips = state.get("groups").map((entry, number) => {
    const bars = new Float64Array(BOARD.bins);
    const values = scores.filter((_, row) => group[row] === number);
    for (const value of values) {
      const share = (Math.min(high, Math.max(low, value)) - range[0]) / (range[1] - range[0]);
      bars[Math.min(BOARD.bins - 1, Math.floor(share * BOARD.bins))] += 1;
    }
    const above = (threshold) => values.reduce((sum, value) => sum + (value > threshold), 0);
    return { ...entry, bars, total: values.length, above };
  });
  return { range, strips };
}

/** Bars of the pixels, from the table; heights are logarithmic, as defects are few. */
function pixelStrips(state) {
  const table = pixelTable(state);
  const range = [table.level[0], table.level.at(-1)];
  const strip = (name, colour, counts, total) => {
    const bars = new Float64Array(BOARD.bins);
    for (let i = 0; i < table.level.length; i += 1) {
      const share = (table.level[i] - range[0]) / (range[1] - range[0] || 1);
      const inside = counts[i] - (counts[i + 1] ?? 0);
      bars[Math.min(BOARD.bins - 1, Math.floor(share * BOARD.bins))] += inside;
    }
    const above = (threshold) => counts[nearestLevel(table.level, threshold)];
    return { name, colour, bars: bars.map(Math.log1p), total, above };
  };
  const strips = [
    strip("held-out normal", GREY, table.held_out, table.n_held_out),
    strip("test normal", BLUE, table.normal, table.n_normal),
    strip("defect", VERMILION, table.anomalous, table.n_anomalous),
  ];
  return { range, strips: strips.filter((entry) => entry.total) };
}

/** Points of ROC and of precision over recall: images from the kernel, pixels from the table. */
function curvePoints(state) {
  const table = pixelTable(state);
  if (state.get("level") === "image" || !table) return state.get("curves");
  const { n_normal: normal, n_anomalous: anomalous } = table;
  const roc = [[1, 1]], pr = [];
  if (!normal || !anomalous) return null;
  table.level.forEach((_, i) => {
    roc.push([table.normal[i] / normal, table.anomalous[i] / anomalous]);
    const flagged = table.normal[i] + table.anomalous[i];
    if (flagged) pr.push([table.anomalous[i] / anomalous, table.anomalous[i] / flagged]);
  });
  return { roc: [...roc, [0, 0]], pr };
}

/** Scores as histograms with a threshold to drag, confusion counts, ratios, ROC and PR. */
export function board(element, state) {
  const root = make("div", { className: "ad-board ad-view", tabIndex: 0 }, element);
  root.dataset.lmSuppressShortcuts = "true";
  root.style.width = `${BOARD.width}px`;
  const plot = draw("svg", { class: "ad-histogram", width: BOARD.width }, root);
  const rule = make("div", { className: "ad-rule" }, root);
  const below = make("div", { className: "ad-below" }, root);
  const table = make("div", { className: "ad-confusion" }, below);
  const figures = make("div", { className: "ad-figures" }, below);
  const roc = draw("svg", { class: "ad-roc", viewBox: "0 0 170 170" }, below);
  const pr = draw("svg", { class: "ad-pr", viewBox: "0 0 170 170" }, below);
  let parts = null, painted = 0;

  const isImage = () => state.get("level") === "image" || !pixelTable(state);
  const name = () => (isImage() ? "threshold" : "pixel_threshold");
  const inner = BOARD.width - BOARD.left - BOARD.right;
  const toX = (value) => {
    const share = (value - parts.range[0]) / (parts.range[1] - parts.range[0]);
    return BOARD.left + inner * Math.min(1, Math.max(0, share));
  };

  function setThreshold(value) {
    if (isImage()) return change(state, { threshold: value });
    const { level } = pixelTable(state);
    // The table knows exact counts at its levels, so the hand moves from level to level
    return change(state, { pixel_threshold: level[nearestLevel(level, value)] });
  }

  /** What does not move with the threshold. */
  function build() {
    parts = isImage() ? imageStrips(state) : pixelStrips(state);
    const height = parts.strips.length * BOARD.strip;
    plot.replaceChildren();
    plot.setAttribute("height", height + 30);
    parts.texts = parts.strips.map((strip, number) => {
      const base = (number + 1) * BOARD.strip;
      const top = strip.bars.reduce((a, b) => Math.max(a, b), 1e-9);
      const wide = inner / BOARD.bins;
      strip.bars.forEach((count, bin) => {
        if (!count) return;
        const high = Math.max(1.5, ((BOARD.strip - 10) * count) / top);
        draw("rect", { x: BOARD.left + bin * wide, y: base - high, width: Math.max(1, wide - 0.8),
          height: high, fill: strip.colour }, plot);
      });
      draw("line", { x1: BOARD.left, x2: BOARD.left + inner, y1: base, y2: base,
        class: "ad-axis" }, plot);
      draw("text", { x: BOARD.left - 8, y: base - 12, "text-anchor": "end", text: strip.name },
        plot);
      return draw("text", { x: BOARD.left + inner + 8, y: base - 12 }, plot);
    });
    for (const share of [0, 0.25, 0.5, 0.75, 1]) {
      const value = parts.range[0] + share * (parts.range[1] - parts.range[0]);
      draw("text", { x: BOARD.left + share * inner, y: height + 16, "text-anchor": "middle",
        class: "ad-tick", text: short(value) }, plot);
    }
    parts.line = draw("line", { y1: 0, y2: height + 4, class: "ad-threshold" }, plot);
    parts.grip = draw("rect", { y: height + 2, width: 12, height: 24, rx: 3, class: "ad-grip" },
      plot);
    const points = curvePoints(state);
    parts.dots = [
      buildCurve(roc, points?.roc, "ROC", "false-alarm rate", "recall"),
      buildCurve(pr, points?.pr, "precision–recall", "recall", "precision"),
    ];
    paint();
  }

  function buildCurve(svg, points, title, across, up) {
    svg.replaceChildren();
    draw("text", { x: 90, y: 12, "text-anchor": "middle", text: title }, svg);
    draw("rect", { x: 30, y: 20, width: 125, height: 125, class: "ad-frame" }, svg);
    draw("text", { x: 92, y: 163, "text-anchor": "middle", class: "ad-tick", text: across }, svg);
    draw("text", { x: 0, y: 0, "text-anchor": "middle", class: "ad-tick", text: up,
      transform: "translate(20 82) rotate(-90)" }, svg);
    if (points?.length) {
      const path = points.map(([x, y]) => `${30 + 125 * x},${145 - 125 * y}`).join(" ");
      draw("polyline", { points: path, class: "ad-curve" }, svg);
    }
    return draw("circle", { r: 4.5, class: "ad-dot" }, svg);
  }

  function place(dot, x, y) {
    dot.setAttribute("visibility", x === null || y === null ? "hidden" : "visible");
    if (x === null || y === null) return;
    dot.setAttribute("cx", 30 + 125 * x);
    dot.setAttribute("cy", 145 - 125 * y);
  }

  function confusion(result) {
    const counts = { found: result.tp, missed: result.fn, false_alarm: result.fp,
      passed: result.tn };
    const pixels = !isImage();
    table.replaceChildren();
    for (const [cell, count] of Object.entries(counts)) {
      const wrong = cell === "missed" || cell === "false_alarm";
      const button = make("button", { className: "ad-cell", disabled: pixels,
        title: pixels ? "pixels" : "show these images" }, table);
      button.dataset.cell = cell;
      button.classList.toggle("ad-wrong", wrong);
      button.classList.toggle("ad-chosen", !pixels && state.get("cell") === cell);
      make("b", { textContent: `${count}` }, button);
      make("span", { textContent: CELLS[cell] }, button);
    }
  }

  /** What the held-out normals say about the rate of false alarms at the threshold. */
  function heldOutText() {
    const bounds = state.get("bounds");
    if (!isImage()) return "";
    if (!bounds?.length) return "no held-out normals: nothing bounds the rate of false alarms";
    const scores = numbers(state.get("scores"), Float64Array);
    const heldOut = numbers(state.get("held_out"), Uint8Array);
    const threshold = imageThreshold(state);
    let above = 0;
    scores.forEach((score, row) => { above += heldOut[row] && score > threshold ? 1 : 0; });
    const bound = (100 * bounds[above]).toPrecision(3);
    return `held-out normals above: ${above} of ${bounds.length - 1}; rate of false alarms at `
      + `most ${bound} % with 95 % confidence`;
  }

  function paint() {
    const value = state.get(name());
    const x = toX(value);
    parts.line.setAttribute("x1", x);
    parts.line.setAttribute("x2", x);
    parts.grip.setAttribute("x", x - 6);
    const compared = isImage() ? imageThreshold(state) : Math.fround(value);
    parts.strips.forEach((strip, number) => {
      parts.texts[number].textContent = `${strip.above(compared)} of ${strip.total}`;
    });
    const result = isImage() ? imageMetrics(state) : pixelMetrics(state);
    confusion(result);
    const rows = [["precision", result.precision], ["recall", result.recall], ["F1", result.f1],
      ["false-alarm rate", result.false_alarm_rate]];
    if (!isImage()) {
      rows.push(["IoU", result.iou], ["recall per region", result.region_recall]);
      rows.push(["regions touched", `${result.regions_found} of ${result.n_regions}`]);
    }
    figures.replaceChildren();
    for (const [label, number] of rows) {
      const line = make("div", {}, figures);
      make("span", { textContent: label }, line);
      const text = typeof number === "string" ? number
        : number === null ? "–" : number.toFixed(3);
      make("b", { textContent: result.exact === false ? `≈ ${text}` : text }, line);
    }
    const chosen = state.get("rules")[name()];
    const known = chosen && chosen.threshold === value ? chosen.text : "set by hand";
    rule.replaceChildren();
    make("b", { textContent: `anomalous: score > ${short(value)}` }, rule);
    make("span", { textContent: ` ${known}` }, rule);
    make("div", { textContent: heldOutText() }, rule);
    place(parts.dots[0], result.false_alarm_rate, result.recall);
    place(parts.dots[1], result.recall, result.precision);
    painted += 1;
    root.dataset.painted = painted;
    root.dataset.threshold = value;
  }
  const ask = onceAFrame(paint);
  const rebuild = onceAFrame(build);

  function moveTo(event) {
    const box = plot.getBoundingClientRect();
    const share = (event.clientX - box.left - BOARD.left) / inner;
    const [low, high] = parts.range;
    setThreshold(low + Math.min(1, Math.max(0, share)) * (high - low));
  }
  let dragging = false;
  plot.addEventListener("pointerdown", (event) => {
    event.preventDefault();
    root.focus({ preventScroll: true });
    plot.setPointerCapture(event.pointerId);
    dragging = true;
    moveTo(event);
  });
  plot.addEventListener("pointermove", (event) => dragging && moveTo(event));
  for (const end of ["pointerup", "pointercancel"]) {
    plot.addEventListener(end, () => { dragging = false; });
  }
  root.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const [low, high] = parts.range;
    setThreshold(state.get(name()) + (by * (high - low)) / 200);
  });
  table.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-cell]")?.dataset.cell;
    if (cell) change(state, { cell: state.get("cell") === cell ? "all" : cell, page: 0 });
  });

  const stops = [
    follow(state, ["threshold", "pixel_threshold", "cell", "rules", "pixel_exact"], ask),
    follow(state, [...TRUTH, "level", "groups", "group", "pixel_table", "curves", "bounds"],
      rebuild),
  ];
  build();
  return () => {
    stops.forEach((stop) => stop());
    ask.stop();
    rebuild.stop();
  };
}

// ---------------------------------------------------------------- gallery

/** Small pictures of the images of one confusion cell; a click opens one in the viewer. */
export function gallery(element, state) {
  const root = make("div", { className: "ad-gallery ad-view" }, element);
  const tabs = make("div", { className: "ad-tabs" }, root);
  const grid = make("div", { className: "ad-grid" }, root);
  const foot = make("div", { className: "ad-foot" }, root);
  const pictures = new Map();
  const asked = new Set();
  const tiles = new Map();
  let painted = 0;

  /** Row numbers come with the pictures, for the answers may come in any order. */
  function receive(message, buffers) {
    if (message.kind !== "thumbnails") return;
    message.rows.forEach((row, i) => {
      pictures.set(row, URL.createObjectURL(new Blob([buffers[i]], { type: "image/jpeg" })));
      const image = tiles.get(row)?.querySelector("img");
      if (image) image.src = pictures.get(row);
    });
    root.dataset.pictures = pictures.size;
  }

  function askFor(rows) {
    const missing = rows.filter((row) => !asked.has(row));
    missing.forEach((row) => asked.add(row));
    if (missing.length) state.send({ kind: "thumbnails", rows: missing });
  }

  function tileOf(row) {
    if (tiles.has(row)) return tiles.get(row);
    const tile = make("button", { className: "ad-tile" });
    tile.dataset.row = row;
    const image = make("img", { alt: "", draggable: false }, tile);
    if (pictures.has(row)) image.src = pictures.get(row);
    make("span", {}, tile);
    tiles.set(row, tile);
    return tile;
  }

  function paint() {
    const counts = countCells(state);
    tabs.replaceChildren();
    for (const [cell, text] of Object.entries(CELLS)) {
      if (!counts[cell] && (cell === "unknown" || cell === "held_out")) continue;
      const tab = make("button", { className: "ad-tab", textContent: `${text} ${counts[cell]}` },
        tabs);
      tab.dataset.cell = cell;
      tab.classList.toggle("ad-chosen", state.get("cell") === cell);
    }
    const rows = listedRows(state);
    const pages = Math.max(1, Math.ceil(rows.length / PAGE));
    const page = Math.min(pages - 1, Math.max(0, state.get("page")));
    const shown = rows.slice(page * PAGE, (page + 1) * PAGE);
    const scores = numbers(state.get("scores"), Float64Array);
    const kinds = state.get("defect_types");
    const cells = cellsOf(state);
    const wanted = shown.map(tileOf);
    shown.forEach((row, i) => {
      const wrong = cells[row] === "missed" || cells[row] === "false_alarm";
      wanted[i].classList.toggle("ad-wrong", wrong);
      wanted[i].classList.toggle("ad-chosen", row === state.get("row"));
      wanted[i].title = `${CELLS[cells[row]]} · ${state.get("names")[row]}`;
      wanted[i].lastChild.textContent = `${short(scores[row])} ${kinds[row]}`;
    });
    // The tiles are kept, so that a moving threshold moves them and loads nothing
    const same = wanted.length === grid.children.length
      && wanted.every((tile, i) => tile === grid.children[i]);
    if (!same) grid.replaceChildren(...wanted);
    if (!wanted.length) grid.replaceChildren(make("i", { textContent: "no image here" }));
    foot.replaceChildren();
    const back = make("button", { textContent: "‹", disabled: page === 0 }, foot);
    const first = rows.length ? page * PAGE + 1 : 0;
    make("span", { textContent: ` ${first} to ${page * PAGE + shown.length} of ${rows.length} ` },
      foot);
    const forth = make("button", { textContent: "›", disabled: page >= pages - 1 }, foot);
    back.addEventListener("click", () => change(state, { page: page - 1 }));
    forth.addEventListener("click", () => change(state, { page: page + 1 }));
    askFor(shown);
    painted += 1;
    root.dataset.painted = painted;
    root.dataset.count = rows.length;
  }
  const ask = onceAFrame(paint);

  tabs.addEventListener("click", (event) => {
    const cell = event.target.closest("[data-cell]")?.dataset.cell;
    if (cell) change(state, { cell, page: 0 });
  });
  grid.addEventListener("click", (event) => {
    const row = event.target.closest("[data-row]")?.dataset.row;
    if (row !== undefined) change(state, { row: Number(row) });
  });

  /** Other predictions have other pictures. */
  function forget() {
    pictures.forEach((address) => URL.revokeObjectURL(address));
    for (const store of [pictures, asked, tiles]) store.clear();
    ask();
  }

  const stops = [
    follow(state, ["threshold", "cell", "order", "reverse", "page", "row"], ask),
    follow(state, [...TRUTH, "names", "defect_types"], forget),
  ];
  state.on("msg:custom", receive);
  ask();
  return () => {
    stops.forEach((stop) => stop());
    ask.stop();
    state.off("msg:custom", receive);
    pictures.forEach((address) => URL.revokeObjectURL(address));
  };
}

// ---------------------------------------------------------------- report

const decode = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));

/** Inflate gzip. */
async function inflate(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** Put the bytes of float32 numbers together again; the file has all first bytes, then all second. */
function joinPlanes(planes) {
  const count = planes.length / 4;
  const bytes = new Uint8Array(planes.length);
  for (let plane = 0; plane < 4; plane += 1) {
    for (let i = 0; i < count; i += 1) bytes[4 * i + plane] = planes[plane * count + i];
  }
  return bytes;
}

/** A control of the page for one field of the state; Jupyter has its own widgets. */
function control(parent, state, name, text, properties) {
  const label = make("label", { textContent: `${text} ` }, parent);
  const { options, ...rest } = properties;
  const input = make(options ? "select" : "input", rest, label);
  for (const option of options ?? []) make("option", { value: option, textContent: option }, input);
  input.dataset.name = name;
  const box = input.type === "checkbox";
  const show = () => {
    if (box) input.checked = state.get(name);
    else if (input.value !== `${state.get(name)}`) input.value = state.get(name);
  };
  input.addEventListener("input", () => {
    const value = box ? input.checked : options ? input.value : Number(input.value);
    // An empty or half-typed number is no number yet
    if (box || options || (input.value !== "" && Number.isFinite(value))) {
      change(state, { [name]: value });
    }
  });
  follow(state, [name], show);
  show();
}

/** The whole report: `data` is what living_report.py wrote, `element` the place for it. */
export function report(element, data) {
  const values = { ...data.state };
  for (const name of data.binary) values[name] = decode(values[name]);
  for (const [name, text] of Object.entries(values.colour_maps)) {
    values.colour_maps[name] = decode(text);
  }
  for (const name of data.table_binary) values.pixel_table[name] = decode(values.pixel_table[name]);
  const state = new Store(values);
  const items = new Map();

  /** A row whose map is not in the file: its small picture has to do. */
  function smallItem(row) {
    const score = numbers(state.get("scores"), Float64Array)[row];
    return { row, score, name: state.get("names")[row], defect_type: state.get("defect_types")[row],
      note: "map not in this report", size: data.size, image: decode(data.thumbnails[row]),
      map: new Uint8Array(0), mask: new Uint8Array(0) };
  }
  async function itemOf(row) {
    if (items.has(row)) return items.get(row);
    const stored = data.items[row];
    if (!stored) return smallItem(row);
    const item = { ...stored, image: decode(stored.image), mask: await inflate(decode(stored.mask)) };
    item.map = joinPlanes(await inflate(decode(stored.map)));
    items.set(row, item);
    // The last few are kept unpacked
    if (items.size > 32) items.delete(items.keys().next().value);
    return item;
  }
  async function showRow() {
    const row = state.get("row");
    const item = await itemOf(row);
    if (row === state.get("row")) state.set("item", item);
  }
  state.on("change:row", showRow);
  state.answer = (message) => {
    if (message.kind !== "thumbnails") return;
    const pictures = message.rows.map((row) => decode(data.thumbnails[row]));
    setTimeout(() => state.emit("msg:custom", message, pictures));
  };

  const top = make("div", { className: "ad-top" }, element);
  const [left, right] = [make("div", {}, top), make("div", {}, top)];
  const bar = make("div", { className: "ad-controls ad-view" }, left);
  const wide = { type: "number", step: "any" };
  if (data.has_pixels) control(bar, state, "level", "level", { options: ["image", "pixel"] });
  control(bar, state, "threshold", "image limit", wide);
  control(bar, state, "pixel_threshold", "pixel limit", wide);
  const presets = make("div", { className: "ad-controls ad-view" }, left);
  for (const preset of data.presets) {
    const button = make("button", { textContent: preset.name, title: preset.text }, presets);
    button.addEventListener("click", () => {
      const rules = { ...state.get("rules") };
      rules[preset.field] = { threshold: preset.threshold, text: preset.text };
      change(state, { rules, [preset.field]: preset.threshold });
    });
  }
  const looks = make("div", { className: "ad-controls ad-view" }, right);
  control(looks, state, "mode", "mode", { options: MODES });
  control(looks, state, "colour_map", "colours", { options: Object.keys(values.colour_maps) });
  control(looks, state, "opacity", "opacity", { type: "range", min: 0, max: 1, step: 0.05 });
  control(looks, state, "show_contour", "contour", { type: "checkbox" });
  control(looks, state, "show_truth", "truth", { type: "checkbox" });
  board(left, state);
  viewer(right, state);
  const sorting = make("div", { className: "ad-controls ad-view" }, element);
  control(sorting, state, "order", "sort by", { options: ["row", "score", "margin", "defect type"] });
  control(sorting, state, "reverse", "reverse", { type: "checkbox" });
  gallery(element, state);
  showRow();
  return state;
}

// ---------------------------------------------------------------- Jupyter

const VIEWS = { viewer, board, gallery };

/** What anywidget calls: the view finds the state that it shares with others. */
async function render({ model, el }) {
  const id = model.get("state").replace("IPY_MODEL_", "");
  const state = await model.widget_manager.get_model(id);
  return VIEWS[model.get("view")](el, state);
}

export default { render };
