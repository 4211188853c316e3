// Texts for the panel's numbers and states.
import { t, text } from "../texts.js";

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
  if (seconds < 1) return t("$number steps/s", { number: (1 / seconds).toFixed(1) });
  return t("$number s/step", { number: seconds.toFixed(1) });
}

export function formatTime(seconds) {
  if (!Number.isFinite(seconds)) return NONE;
  if (seconds < 90) return t("$seconds s", { seconds: Math.ceil(seconds) });
  const minutes = Math.round(seconds / 60);
  if (minutes < 90) return t("$minutes min", { minutes });
  return t("$hours h $minutes min", { hours: Math.floor(minutes / 60), minutes: minutes % 60 });
}

export function formatMemory(memory) {
  if (!memory) return NONE;
  const [used, total] = memory.map((bytes) => bytes / GB);
  return `${used.toFixed(used < 10 ? 1 : 0)} / ${total.toFixed(0)} GB`;
}

export function formatBytes(bytes) {
  const power = Math.min(3, Math.floor(Math.log2(Math.max(1, bytes)) / 10));
  const value = bytes / 1024 ** power;
  return `${value.toFixed(value < 10 && power ? 1 : 0)} ${["B", "KB", "MB", "GB"][power]}`;
}

export function formatEpoch(epoch) {
  return epoch === null ? NONE : String(epoch + 1);
}

// Work between two steps or before the first, by the server's name for it.
const WORK = {
  loading: text("Loading the model"),
  gradients: text("Checking gradients"),
  measuring: text("Measuring a step"),
  previews: text("Drawing sample pictures"),
};

// Warnings by kind; for an unknown kind, the server's English text is shown.
const WARNINGS = {
  skipped: text("$count of $total files skipped: $names"),
  enlarged: text("Enlarged pictures, the smallest from $smallest to $side pixels: $names"),
  batch: text("batch_size $batch is larger than the dataset: a step uses at most all $count pictures."),
  unread: text("$count of $total keys of the adapter to start from fit no layer and have no effect: $names"),
  alpha: text("The adapter to start from has no adapter_config.json of peft, so its rank counts as alpha."),
  damaged: text("The save of step $states is damaged. Training resumed from step $step."),
  sources: text("The text encoder does not see the source pictures; see prompt_node in Graft Run Options."),
  resolution: text("resolution $resolution is far from the $usual pixels that $family was made for."),
};

export function listWarnings(training) {
  return training.warnings.map((warning) => (WARNINGS[warning.kind] ? t(WARNINGS[warning.kind], warning) : warning.text));
}

export const ABOUT_LOSS = text(
  "Loss at equal noise, 1 for the median. Staying high: a wrong caption or an odd picture. Far below: learned by heart.",
);

// Return the pictures that the training finds hard and those that it has memorized, one line each.
export function listPictures({ hardest, memorized }) {
  const join = (pictures) => pictures.map(([name, loss]) => `${name} ${loss.toFixed(2)}`).join(", ");
  return [
    hardest.length ? t("Hardest pictures: $names", { names: join(hardest) }) : "",
    memorized.length ? t("Memorized pictures: $names", { names: join(memorized) }) : "",
  ].filter(Boolean);
}

export function describe(training) {
  const { step, saved, done, total, hours } = training;
  if (training.isLive && training.asked) {
    return training.asked === "stop" ? t("Stopping after this step") : t("Pausing after this step");
  }
  if (training.isLive && training.work) return t(WORK[training.work] ?? "Getting ready");
  const texts = {
    preparing: t("Getting ready"),
    drawing: t("Drawing class images: $done of $total", { done, total }),
    caching: t("Encoding the dataset: $done of $total", { done, total }),
    training: training.resumedFrom
      ? t("Training, resumed at step $step", { step: training.resumedFrom })
      : t("Training"),
    finished: t("Finished"),
    returned: t("Already finished: returned the saved result"),
    stopped: t("Stopped and kept at step $step", { step }),
    waiting: hours.starts
      ? t("Waiting until $time at step $step", { time: hours.starts, step })
      : t("Waiting for other prompts at step $step", { step }),
    removed: t("No longer queued, at step $step", { step }),
    paused: saved ? t("Paused at step $step", { step: saved }) : t("Paused before the first step"),
    cancelled: training.isNothing ? t("Stopped before the first step") : t("Cancelled at step $step", { step }),
    failed: t("Failed"),
    lost: t("The server was restarted at step $step", { step }),
  };
  return texts[training.phase];
}

// Return advice about the training's state; empty if there is none.
export function advise(training) {
  const { phase, saved, curve, lowest } = training;
  if (phase === "training") return training.note;
  if (phase === "failed") return training.cure;
  if (phase === "stopped") {
    const isEarly = curve.end === training.step;
    const why = isEarly ? t("The validation loss has not fallen since step $step.", { step: lowest }) : "";
    return `${why} ${t("Run returns the saved result. Resume continues to the last step.")}`.trim();
  }
  if (phase === "waiting" && training.hours.starts) return t("Training continues then by itself. It is the server's time.");
  if (phase === "waiting") {
    const first = training.ahead ? t("Prompts that run first: $count.", { count: training.ahead }) : "";
    return `${first} ${t("Training continues behind them by itself.")}`.trim();
  }
  if (phase === "removed") {
    return t("Its prompt was removed from the queue, or the server was restarted. Press Resume or Run to continue.");
  }
  if (phase === "paused") return t("Press Resume or Run to continue. The pause does not change the result.");
  if (phase === "cancelled") {
    if (training.isNothing) return t("There was no result to keep yet. Press Run to start again.");
    if (!saved) return t("Press Resume or Run to start again.");
    return t("Saved at step $step. Press Resume or Run to continue from there.", { step: saved });
  }
  if (phase === "lost") return t("Press Run to continue from the last save.");
  return "";
}

// Return the heading of the queue's trainings: the time left of all of them, as far as it is known.
export function describeQueue(trainings) {
  const known = trainings.map((training) => training.seconds_left).filter(Number.isFinite);
  if (!known.length) return t("Queue");
  const time = formatTime(known.reduce((sum, seconds) => sum + seconds, 0));
  return known.length === trainings.length ? t("Queue: $time left", { time }) : t("Queue: more than $time left", { time });
}

export function nameOf({ run, name }) {
  return run ?? (name || t("Training"));
}

// Return the queue's trainings in order in one line; empty for a single one.
export function listQueue(prompts) {
  const trainings = prompts.flatMap((prompt) => prompt.trainings);
  if (trainings.length < 2) return "";
  const names = trainings.map((training, place) => `${place + 1}. ${nameOf(training)}`);
  return `${describeQueue(trainings)}. ${names.join(", ")}`;
}

export function isGoingOn({ isLive, phase }) {
  return isLive || phase === "waiting";
}

// The waiting prompts for which a training pauses, by the server's name for them.
const WAYS = {
  off: text("Other prompts wait until the training ends."),
  "to everything": text("The training pauses for every other prompt and continues behind it by itself."),
  "to short prompts": text("The training pauses for prompts without a training and continues behind them by itself."),
};

export function describeWay(giveWay) {
  return t(WAYS[giveWay]);
}

// Return the difference between a training and what Run would train; empty if there is none.
export function remark(training, isSame, steps) {
  if (!isSame) {
    return training.isLive
      ? t("This training was queued with other values than the node shows.")
      : t("You changed values since. Run trains with the new values.");
  }
  const goesOn = !training.isLive && Number.isInteger(steps) && training.steps > 0 && steps > training.steps;
  return goesOn ? t("Press Run to continue to step $steps.", { steps }) : "";
}

// Return the chart in words, for screen readers.
export function describeCurve(training) {
  const { curve } = training;
  if (!curve.length) return t("Loss: no step done yet.");
  const [first, last] = [formatLoss(curve.smooth[0]), formatLoss(curve.smooth.at(-1))];
  const range = { from: curve.steps[0], to: curve.steps.at(-1), steps: training.steps, first, last };
  const trend = t("Loss from step $from to $to of $steps: smoothed $first at first, $last now.", range);
  if (!curve.validation.length) return trend;
  const checked = t("Validation loss $loss.", { loss: formatLoss(curve.validation.at(-1)[1]) });
  return [trend, checked, curve.best === null ? "" : t("Best at step $step.", { step: curve.best })].join(" ").trim();
}
