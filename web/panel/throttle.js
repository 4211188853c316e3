// Throttling of work that is requested often.

// Return a function that runs `work` soon, at most once per `pause` milliseconds and only while the page is visible.
export function throttled(work, pause) {
  let waiting = false;
  let last = -Infinity;
  const run = () =>
    requestAnimationFrame(() => {
      waiting = false;
      last = performance.now();
      work();
    });
  return () => {
    if (waiting) return;
    waiting = true;
    const rest = pause - (performance.now() - last);
    if (rest > 0) setTimeout(run, rest);
    else run();
  };
}
