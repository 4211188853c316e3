// A mask at its picture's full size. The canvas holds what training leaves out: black, as opaque as it is left out.

const MOST_PIXELS = 48e6; // pixels that the steps to undo may hold together

export class MaskCanvas {
  // Nothing is learned at first. changed: called after each change.
  constructor(width, height, changed) {
    this.element = document.createElement("canvas");
    Object.assign(this.element, { width, height });
    this._pen = this.element.getContext("2d", { willReadFrequently: true });
    this._pen.lineCap = "round";
    this._pen.lineJoin = "round";
    this._pen.fillRect(0, 0, width, height);
    this._changed = changed;
    this._past = []; // pixels before each change: {x, y, pixels}
    this._future = [];
    this._stroke = null;
  }

  get canUndo() {
    return this._past.length > 0;
  }

  get canRedo() {
    return this._future.length > 0;
  }

  // Begin a stroke of a brush that lets training learn, or leaves out.
  beginStroke(point, size, learns) {
    this._stroke = { size, learns, points: [point], before: this._copy() };
    this._draw(point, point);
  }

  moveStroke(point) {
    if (!this._stroke) return;
    this._draw(this._stroke.points.at(-1), point);
    this._stroke.points.push(point);
  }

  endStroke() {
    if (!this._stroke) return;
    const { size, points, before } = this._stroke;
    this._stroke = null;
    const half = size / 2 + 2;
    const [xs, ys] = [points.map(([x]) => x), points.map(([, y]) => y)];
    const left = Math.max(0, Math.floor(Math.min(...xs) - half));
    const top = Math.max(0, Math.floor(Math.min(...ys) - half));
    const right = Math.min(this.element.width, Math.ceil(Math.max(...xs) + half));
    const bottom = Math.min(this.element.height, Math.ceil(Math.max(...ys) + half));
    if (right <= left || bottom <= top) return;
    const pixels = before.getContext("2d").getImageData(left, top, right - left, bottom - top);
    this._keep({ x: left, y: top, pixels });
  }

  fill() {
    this._changeAll(() => this._pen.clearRect(0, 0, this.element.width, this.element.height));
  }

  invert() {
    const { width, height } = this.element;
    this._changeAll(() => this._compose("source-out", () => this._pen.fillRect(0, 0, width, height)));
  }

  soften(pixels) {
    const { width, height } = this.element;
    const copy = this._copy();
    this._changeAll(() => {
      this._pen.clearRect(0, 0, width, height);
      this._pen.filter = `blur(${pixels / 2}px)`;
      // The frame's colors go on beyond it: a blur would else let training learn along the frame.
      const pad = Math.ceil(pixels * 2);
      this._pen.drawImage(extend(copy, pad), -pad, -pad);
      this._pen.filter = "none";
    });
  }

  // Take a picture as the mask: white is learned; black and transparent are not.
  async load(blob, isStep = true) {
    const image = await createImageBitmap(blob);
    const { width, height } = this.element;
    const pen = newCanvas(width, height).getContext("2d");
    pen.drawImage(image, 0, 0, width, height);
    const read = pen.getImageData(0, 0, width, height);
    const { data } = read;
    for (let place = 0; place < data.length; place += 4) {
      const light = 0.299 * data[place] + 0.587 * data[place + 1] + 0.114 * data[place + 2];
      data[place + 3] = 255 - Math.round((light * data[place + 3]) / 255);
      data.fill(0, place, place + 3);
    }
    const put = () => this._pen.putImageData(read, 0, 0);
    if (isStep) this._changeAll(put);
    else put();
  }

  undo() {
    this._swap(this._past, this._future);
  }

  redo() {
    this._swap(this._future, this._past);
  }

  // Return the mask as a PNG: white is learned.
  toBlob() {
    const { width, height } = this.element;
    const canvas = newCanvas(width, height);
    const pen = canvas.getContext("2d");
    pen.fillStyle = "white";
    pen.fillRect(0, 0, width, height);
    pen.drawImage(this.element, 0, 0);
    return new Promise((take, fail) =>
      canvas.toBlob((blob) => (blob ? take(blob) : fail(new Error("The browser cannot make this mask."))), "image/png"),
    );
  }

  _draw([fromX, fromY], [toX, toY]) {
    const { size, learns } = this._stroke;
    this._pen.lineWidth = size;
    this._compose(learns ? "destination-out" : "source-over", () => {
      this._pen.beginPath();
      this._pen.moveTo(fromX, fromY);
      this._pen.lineTo(toX, toY);
      this._pen.stroke();
    });
  }

  _compose(way, work) {
    this._pen.globalCompositeOperation = way;
    work();
    this._pen.globalCompositeOperation = "source-over";
  }

  _copy() {
    const copy = newCanvas(this.element.width, this.element.height);
    copy.getContext("2d").drawImage(this.element, 0, 0);
    return copy;
  }

  _changeAll(work) {
    const pixels = this._pen.getImageData(0, 0, this.element.width, this.element.height);
    work();
    this._keep({ x: 0, y: 0, pixels });
  }

  _keep(step) {
    this._past.push(step);
    this._future = [];
    const held = () => this._past.reduce((sum, { pixels }) => sum + pixels.width * pixels.height, 0);
    while (this._past.length > 1 && held() > MOST_PIXELS) this._past.shift();
    this._changed();
  }

  _swap(from, to) {
    const step = from.pop();
    if (!step) return;
    const { x, y, pixels } = step;
    to.push({ x, y, pixels: this._pen.getImageData(x, y, pixels.width, pixels.height) });
    this._pen.putImageData(pixels, x, y);
    this._changed();
  }
}

function newCanvas(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

// Return a picture with its outermost pixels repeated around it.
function extend(image, pad) {
  const { width, height } = image;
  const canvas = newCanvas(width + 2 * pad, height + 2 * pad);
  const pen = canvas.getContext("2d");
  const columns = [[0, 1, 0, pad], [0, width, pad, width], [width - 1, 1, pad + width, pad]];
  const rows = [[0, 1, 0, pad], [0, height, pad, height], [height - 1, 1, pad + height, pad]];
  for (const [x, wide, toX, toWide] of columns) {
    for (const [y, high, toY, toHigh] of rows) pen.drawImage(image, x, y, wide, high, toX, toY, toWide, toHigh);
  }
  return canvas;
}
