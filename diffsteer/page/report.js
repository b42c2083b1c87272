"use strict";
(() => {
  const prompts = [...document.querySelectorAll("section.prompt")];
  const here = () => {
    const focused = prompts.indexOf(document.activeElement && document.activeElement.closest("section.prompt"));
    return focused >= 0 ? focused : prompts.findIndex((s) => s.getBoundingClientRect().bottom > 80) - 1;
  };
  const go = (n) => {
    const section = prompts[Math.max(0, Math.min(prompts.length - 1, n))];
    if (section) { section.focus({ preventScroll: true }); section.scrollIntoView(); }
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "j" || event.key === "n") go(here() + 1);
    else if (event.key === "k" || event.key === "p") go(here() - 1);
    else if (event.key === "t") {
      const section = prompts[Math.max(0, here())];
      if (section) section.querySelectorAll("details").forEach((d) => { d.open = !d.open; });
    } else return;
    event.preventDefault();
  });
})();
