// The picture and the region drawn on it: box, polygon or painted mask; zoom and move; mouse, touch and keyboard.
// All region coordinates are pixels of the picture.

const MIN_SIDE = 3;
const CLOSE_PX = 10;

function copied(mask) {
  const made = Object.assign(document.createElement("canvas"), { width: mask.width, height: mask.height });
  made.getContext("2d").drawImage(mask, 0, 0);
  return made;
}

export class Viewer {
  constructor(canvas, onChange) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.onChange = onChange;
    this.tool = "box";
    this.brush = 16;
    this.picture = null;
    this.region = null; // {kind: "box", box} | {kind: "polygon", points, closed} | {kind: "brush", mask, painted}
    this.view = { scale: 1, x: 0, y: 0 };
    this.pointers = new Map();
    this.drag = null;
    canvas.addEventListener("pointerdown", (e) => this.down(e));
    canvas.addEventListener("pointermove", (e) => this.move(e));
    for (const name of ["pointerup", "pointercancel"]) canvas.addEventListener(name, (e) => this.up(e));
    canvas.addEventListener("dblclick", () => this.closePolygon());
    canvas.addEventListener("contextmenu", (e) => e.preventDefault());
    canvas.addEventListener("wheel", (e) => this.wheel(e), { passive: false });
    new ResizeObserver(() => this.resize()).observe(canvas);
  }

  show(picture, keep) {
    const same = keep && this.picture && this.picture.width === picture.width && this.picture.height === picture.height;
    this.picture = picture;
    if (!same) {
      this.region = null;
      this.fit();
      this.onChange();
    }
    this.draw();
  }

  resize() {
    const ratio = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(this.canvas.clientWidth * ratio);
    this.canvas.height = Math.round(this.canvas.clientHeight * ratio);
    this.fit();
  }

  fit() {
    if (!this.picture) return;
    const { width, height } = this.picture;
    const [w, h] = [this.canvas.clientWidth, this.canvas.clientHeight];
    const scale = Math.min(w / width, h / height) * 0.96;
    this.view = { scale, x: (w - width * scale) / 2, y: (h - height * scale) / 2 };
    this.draw();
  }

  zoom(factor, x = this.canvas.clientWidth / 2, y = this.canvas.clientHeight / 2) {
    const v = this.view;
    const scale = Math.min(64, Math.max(0.02, v.scale * factor));
    v.x = x - ((x - v.x) * scale) / v.scale;
    v.y = y - ((y - v.y) * scale) / v.scale;
    v.scale = scale;
    this.draw();
  }

  use(tool) {
    this.tool = tool;
    this.canvas.style.cursor = tool === "pan" ? "grab" : "crosshair";
  }

  clear() {
    this.region = null;
    this.changed();
  }

  // -- what was drawn -------------------------------------------------------------------------------------------------

  /** The region as fields of a request; null while there is none. */
  fields() {
    const r = this.region;
    if (!r) return null;
    if (r.kind === "box") {
      const box = this.whole(r.box);
      return box[2] - box[0] >= MIN_SIDE && box[3] - box[1] >= MIN_SIDE ? { box } : null;
    }
    if (r.kind === "polygon") return r.closed && r.points.length > 2 ? { polygon: r.points } : null;
    return r.painted ? { mask: r.mask.toDataURL("image/png") } : null;
  }

  whole([x0, y0, x1, y1]) {
    const { width, height } = this.picture;
    const clip = (v, top) => Math.round(Math.min(top, Math.max(0, v)));
    return [clip(Math.min(x0, x1), width), clip(Math.min(y0, y1), height), clip(Math.max(x0, x1), width), clip(Math.max(y0, y1), height)];
  }

  setBox(box) {
    this.region = { kind: "box", box };
    this.changed();
  }

  closePolygon() {
    const r = this.region;
    if (r?.kind !== "polygon" || r.closed) return false;
    const last = r.points.at(-1), before = r.points.at(-2);
    if (before && Math.hypot(last[0] - before[0], last[1] - before[1]) < 1) r.points.pop(); // of a double click
    if (r.points.length < 3) return false;
    r.closed = true;
    this.changed();
    return true;
  }

  undo() {
    const r = this.region;
    if (r?.kind === "polygon") {
      r.closed = false;
      r.points.pop();
      if (!r.points.length) this.region = null;
    } else {
      this.region = null;
    }
    this.changed();
  }

  /** What was drawn, to be shown again later: the picture it was drawn on and a copy of it. */
  drawn() {
    const r = this.region;
    const copy = r.kind === "brush" ? { ...r, mask: copied(r.mask) } : structuredClone(r);
    return { picture: this.picture, region: copy };
  }

  /** Shows a region again, where its picture is still the one on show. */
  showAgain({ picture, region }) {
    if (picture.width !== this.picture?.width || picture.height !== this.picture?.height) return false;
    this.region = region.kind === "brush" ? { ...region, mask: copied(region.mask) } : structuredClone(region);
    this.changed();
    return true;
  }

  /** A small picture of the region and what is around it. */
  thumb(side) {
    const [x0, y0, x1, y1] = this.bounds();
    const width = Math.max(x1 - x0, y1 - y0) * 1.5;
    const made = Object.assign(document.createElement("canvas"), { width: side, height: side });
    const pen = made.getContext("2d");
    pen.setTransform(side / width, 0, 0, side / width, side / 2 - ((x0 + x1) / 2) * (side / width), side / 2 - ((y0 + y1) / 2) * (side / width));
    pen.drawImage(this.picture, 0, 0);
    this.outline(pen, width / side);
    return made;
  }

  bounds() {
    const r = this.region;
    if (r.kind === "box") return this.whole(r.box);
    if (r.kind === "polygon") {
      const [xs, ys] = [0, 1].map((axis) => r.points.map((point) => point[axis]));
      return [Math.min(...xs), Math.min(...ys), Math.max(...xs), Math.max(...ys)];
    }
    const { width, height } = r.mask;
    const inside = r.mask.getContext("2d").getImageData(0, 0, width, height).data;
    let [x0, y0, x1, y1] = [width, height, 0, 0];
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        if (!inside[4 * (y * width + x) + 3]) continue;
        [x0, y0, x1, y1] = [Math.min(x0, x), Math.min(y0, y), Math.max(x1, x + 1), Math.max(y1, y + 1)];
      }
    }
    return [x0, y0, x1, y1];
  }

  /** Arrow keys: moves the box, or with `grow` its lower right corner; without a box begins one in the middle. */
  nudge(dx, dy, grow) {
    if (!this.picture) return;
    if (this.region?.kind !== "box") return this.middleBox();
    const { width, height } = this.picture;
    let [x0, y0, x1, y1] = this.whole(this.region.box);
    if (grow) {
      x1 = Math.max(x0 + MIN_SIDE, Math.min(width, x1 + dx));
      y1 = Math.max(y0 + MIN_SIDE, Math.min(height, y1 + dy));
    } else {
      dx = Math.max(-x0, Math.min(width - x1, dx));
      dy = Math.max(-y0, Math.min(height - y1, dy));
      [x0, y0, x1, y1] = [x0 + dx, y0 + dy, x1 + dx, y1 + dy];
    }
    this.setBox([x0, y0, x1, y1]);
  }

  middleBox() {
    const { width, height } = this.picture;
    this.setBox([width * 0.4, height * 0.4, width * 0.6, height * 0.6]);
  }

  changed() {
    this.draw();
    this.onChange();
  }

  // -- pointers -------------------------------------------------------------------------------------------------------

  at(e) {
    const r = this.canvas.getBoundingClientRect();
    const [x, y] = [e.clientX - r.left, e.clientY - r.top];
    return { x, y, px: (x - this.view.x) / this.view.scale, py: (y - this.view.y) / this.view.scale };
  }

  down(e) {
    if (!this.picture) return;
    this.canvas.setPointerCapture(e.pointerId);
    this.canvas.focus({ preventScroll: true });
    const p = this.at(e);
    this.pointers.set(e.pointerId, p);
    if (this.pointers.size === 2) {
      this.pinch = this.fingers();
      this.drag = null;
      return;
    }
    const erase = e.shiftKey || e.button === 2;
    if (this.tool === "pan" || e.button === 1 || this.spaceHeld) this.drag = { kind: "pan", from: p, view: { ...this.view } };
    else if (this.tool === "box") this.drag = { kind: "box", from: p, before: this.region };
    else if (this.tool === "polygon") this.point(p);
    else {
      this.drag = { kind: "brush", from: p, erase };
      this.paint(p, p, erase);
    }
  }

  move(e) {
    if (!this.pointers.has(e.pointerId)) return;
    const p = this.at(e);
    this.pointers.set(e.pointerId, p);
    if (this.pinch && this.pointers.size === 2) {
      const now = this.fingers();
      this.view.x += now.x - this.pinch.x;
      this.view.y += now.y - this.pinch.y;
      this.zoom(now.apart / this.pinch.apart, now.x, now.y);
      this.pinch = now;
      return;
    }
    const d = this.drag;
    if (!d) return;
    if (d.kind === "pan") {
      this.view = { ...d.view, x: d.view.x + p.x - d.from.x, y: d.view.y + p.y - d.from.y };
      this.draw();
    } else if (d.kind === "box") {
      this.region = { kind: "box", box: [d.from.px, d.from.py, p.px, p.py] };
      this.draw();
    } else {
      this.paint(d.from, p, d.erase);
      d.from = p;
    }
  }

  up(e) {
    this.pointers.delete(e.pointerId);
    if (this.pointers.size < 2) this.pinch = null;
    const d = this.drag;
    this.drag = null;
    if (!d || d.kind === "pan") return;
    if (d.kind === "box" && !this.fields()) this.region = d.before; // a click, not a box
    this.changed();
  }

  fingers() {
    const [a, b] = [...this.pointers.values()];
    return { x: (a.x + b.x) / 2, y: (a.y + b.y) / 2, apart: Math.max(1, Math.hypot(a.x - b.x, a.y - b.y)) };
  }

  wheel(e) {
    e.preventDefault();
    const p = this.at(e);
    this.zoom(Math.exp(-e.deltaY * 0.0015), p.x, p.y);
  }

  point(p) {
    const { width, height } = this.picture;
    const point = [Math.min(width, Math.max(0, p.px)), Math.min(height, Math.max(0, p.py))].map((v) => Math.round(v * 10) / 10);
    const r = this.region;
    if (r?.kind !== "polygon" || r.closed) this.region = { kind: "polygon", points: [point], closed: false };
    else {
      const [x, y] = r.points[0];
      const near = Math.hypot(x - p.px, y - p.py) * this.view.scale < CLOSE_PX;
      if (near && r.points.length > 2) return void this.closePolygon();
      r.points.push(point);
    }
    this.changed();
  }

  paint(from, to, erase) {
    if (this.region?.kind !== "brush") {
      const mask = document.createElement("canvas");
      mask.width = this.picture.width;
      mask.height = this.picture.height;
      mask.getContext("2d", { willReadFrequently: true }); // for `bounds`
      this.region = { kind: "brush", mask, painted: false };
    }
    const pen = this.region.mask.getContext("2d");
    pen.globalCompositeOperation = erase ? "destination-out" : "source-over";
    pen.strokeStyle = "#fff";
    pen.lineCap = "round";
    pen.lineWidth = this.brush / Math.min(1, this.view.scale);
    pen.beginPath();
    pen.moveTo(from.px, from.py);
    pen.lineTo(to.px + 0.01, to.py);
    pen.stroke();
    if (!erase) this.region.painted = true;
    this.draw();
  }

  // -- drawing --------------------------------------------------------------------------------------------------------

  draw() {
    const { pen, canvas, view } = this;
    const ratio = window.devicePixelRatio || 1;
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    if (!this.picture) return;
    pen.setTransform(ratio * view.scale, 0, 0, ratio * view.scale, ratio * view.x, ratio * view.y);
    pen.imageSmoothingEnabled = view.scale < 4;
    pen.drawImage(this.picture, 0, 0);
    this.outline(pen, 1 / view.scale);
  }

  /** Draws the region; `px` is a pixel of the screen in those of the picture. */
  outline(pen, px) {
    const r = this.region;
    if (!r) return;
    pen.lineWidth = 2 * px;
    pen.strokeStyle = "#3ce0c8";
    pen.fillStyle = "#3ce0c82e";
    if (r.kind === "brush") {
      pen.globalAlpha = 0.45;
      pen.drawImage(this.tinted(r.mask), 0, 0);
      pen.globalAlpha = 1;
      return;
    }
    pen.beginPath();
    if (r.kind === "box") pen.rect(r.box[0], r.box[1], r.box[2] - r.box[0], r.box[3] - r.box[1]);
    else {
      r.points.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      if (r.closed) pen.closePath();
    }
    if (r.kind === "box" || r.closed) pen.fill();
    pen.stroke();
    if (r.kind === "polygon" && !r.closed) {
      pen.fillStyle = "#3ce0c8";
      for (const [x, y] of r.points) pen.fillRect(x - 3 * px, y - 3 * px, 6 * px, 6 * px);
    }
  }

  tinted(mask) {
    const tint = (this.tint ||= document.createElement("canvas"));
    tint.width = mask.width;
    tint.height = mask.height;
    const pen = tint.getContext("2d");
    pen.drawImage(mask, 0, 0);
    pen.globalCompositeOperation = "source-in";
    pen.fillStyle = "#3ce0c8";
    pen.fillRect(0, 0, mask.width, mask.height);
    return tint;
  }
}
