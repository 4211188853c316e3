// Work that is asked for often and done seldom.

// A function that has `work` done soon, at most once in so many milliseconds and only while the page is seen.
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
