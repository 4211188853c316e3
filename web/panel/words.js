// Numbers and states as the panel says them.

const NONE = "\u2013";
const GB = 1024 ** 3;

export function formatLoss(loss) {
  if (!Number.isFinite(loss)) return NONE;
  return Math.abs(loss) >= 0.001 || loss === 0 ? loss.toPrecision(3) : loss.toExponential(1);
}

export function formatRate(rate) {
  return Number.isFinite(rate) ? rate.toExponential(1).replace(".0e", "e") : NONE;
}

export function formatPace(seconds) {
  if (!Number.isFinite(seconds)) return NONE;
  return seconds < 1 ? `${(1 / seconds).toFixed(1)} steps/s` : `${seconds.toFixed(1)} s/step`;
}

export function formatTime(seconds) {
  if (!Number.isFinite(seconds)) return NONE;
  if (seconds < 90) return `${Math.ceil(seconds)} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return `${minutes} min`;
  return `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

export function formatMemory(memory) {
  if (!memory) return NONE;
  const [used, total] = memory.map((bytes) => bytes / GB);
  return `${used.toFixed(used < 10 ? 1 : 0)} / ${total.toFixed(0)} GB`;
}

export function formatEpoch(epoch) {
  return epoch === null ? NONE : String(epoch + 1);
}

// What a training is doing, in a line.
export function describe(training) {
  const { step, steps, saved, done, total } = training;
  if (training.isLive && training.asked) {
    return training.asked === "stop" ? "Stopping after this step" : "Pausing after this step";
  }
  const said = {
    preparing: "Getting ready",
    drawing: `Drawing class images: ${done} of ${total}`,
    caching: `Encoding the dataset: ${done} of ${total}`,
    training: training.resumedFrom ? `Training, resumed at step ${training.resumedFrom}` : "Training",
    finished: "Finished",
    returned: "Finished before: returned as it was",
    stopped: `Stopped and kept at step ${step}`,
    paused: saved ? `Paused at step ${saved}` : "Paused before the first step",
    cancelled: training.isNothing ? "Stopped before the first step" : `Cancelled at step ${step}`,
    failed: "Failed",
    lost: `The server was restarted at step ${step}`,
  };
  return said[training.phase];
}

// What can be done about it, or is good to know; empty where nothing is.
export function advise(training) {
  const { phase, saved } = training;
  if (phase === "training") return training.note;
  if (phase === "failed") return training.cure;
  if (phase === "stopped") return "Run returns what was kept. Resume trains on to the last step.";
  if (phase === "paused") return "Resume or Run goes on, to the same bits.";
  if (phase === "cancelled") {
    if (training.isNothing) return "There was nothing yet to keep. Run starts again.";
    return saved ? `Saved at step ${saved}: Resume or Run goes on from there.` : "Resume or Run starts again.";
  }
  if (phase === "lost") return "Run goes on from the last save.";
  return "";
}

// The chart for those who do not see it.
export function describeCurve(training) {
  const { curve } = training;
  if (!curve.length) return "Loss: no step done yet.";
  const [first, last] = [formatLoss(curve.smooth[0]), formatLoss(curve.smooth.at(-1))];
  const checked = curve.validation.length ? `, validation loss ${formatLoss(curve.validation.at(-1)[1])}` : "";
  return (
    `Loss from step ${curve.steps[0]} to ${curve.steps.at(-1)} of ${training.steps}: ` +
    `smoothed ${first} at first, ${last} now${checked}.`
  );
}
