// A run's loss per step, with a smoothed curve.

const MOST = 16384; // points; beyond this, every second one is dropped
const WEIGHT = 0.04; // weight of a new loss in the smoothed one

export class Curve {
  constructor() {
    this.steps = [];
    this.losses = [];
    this.smooth = [];
    this.validation = []; // [step, loss]
    this.best = null; // step of the kept save with the lowest validation loss
    this.end = null; // step at which the validation loss ended the run
    this._mean = 0;
    this._weight = 0;
  }

  get length() {
    return this.steps.length;
  }

  // Add a step's loss; skip values that are not finite, and steps that are already there.
  add(step, loss) {
    if (!Number.isFinite(loss) || step <= (this.steps.at(-1) ?? -1)) return;
    // Correct the bias toward zero, at which the average starts.
    this._mean += WEIGHT * (loss - this._mean);
    this._weight += WEIGHT * (1 - this._weight);
    this.steps.push(step);
    this.losses.push(loss);
    this.smooth.push(this._mean / this._weight);
    if (this.length > MOST) this._thin();
  }

  addValidation(step, loss) {
    if (Number.isFinite(loss) && step > (this.validation.at(-1)?.[0] ?? -1)) this.validation.push([step, loss]);
  }

  // Insert earlier points before the existing ones: pairs of step and loss, rising.
  prepend(points, validation) {
    const { steps, losses, validation: later, best, end } = this;
    Object.assign(this, new Curve(), { best, end });
    for (const [step, loss] of points) if (step < (steps[0] ?? Infinity)) this.add(step, loss);
    steps.forEach((step, place) => this.add(step, losses[place]));
    for (const [step, loss] of validation) if (step < (later[0]?.[0] ?? Infinity)) this.addValidation(step, loss);
    for (const [step, loss] of later) this.addValidation(step, loss);
  }

  // Return the index of the last point at or before a step, 0 if there is none.
  find(step) {
    let [low, high] = [0, this.length];
    while (low < high) {
      const middle = (low + high) >> 1;
      if (this.steps[middle] <= step) low = middle + 1;
      else high = middle;
    }
    return Math.max(0, low - 1);
  }

  _thin() {
    for (const name of ["steps", "losses", "smooth"]) {
      this[name] = this[name].filter((_, place) => place % 2 === (this.length - 1) % 2);
    }
  }
}
