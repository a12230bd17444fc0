"use strict";
// Filters of the gallery, and folded details opened for printing. The page is complete without it.
const filters = document.getElementById("filters");

if (filters) {
  const list = document.getElementById("cards");
  const tally = document.getElementById("tally");
  const cards = [...list.children].map((element, place) => ({
    element,
    place,
    kind: element.dataset.kind,
    severity: new Map(element.dataset.severity.split(" ").map((pair) => pair.split(":"))),
  }));
  const chosen = { method: "", kind: "" };

  const isShown = (card) =>
    (!chosen.method || card.severity.has(chosen.method)) && (!chosen.kind || card.kind === chosen.kind);

  // Worst first for the method that is looked at; for all methods, in the order of the file.
  const byOrder = (one, other) =>
    (chosen.method ? Number(other.severity.get(chosen.method) ?? -1) - Number(one.severity.get(chosen.method) ?? -1) : 0)
    || one.place - other.place;

  const show = () => {
    for (const card of [...cards].sort(byOrder)) {
      card.element.hidden = !isShown(card);
      list.append(card.element);
    }
    const shown = cards.filter(isShown).length;
    tally.textContent = `${shown} of ${cards.length} images`;
  };

  for (const group of Object.keys(chosen)) {
    const buttons = filters.querySelectorAll(`[data-${group}]`);
    for (const button of buttons) {
      button.addEventListener("click", () => {
        chosen[group] = button.dataset[group];
        for (const each of buttons) each.setAttribute("aria-pressed", String(each === button));
        show();
      });
    }
  }
  filters.hidden = false;
  show();
}

let opened = [];
window.addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open])")];
  for (const each of opened) each.open = true;
});
window.addEventListener("afterprint", () => {
  for (const each of opened) each.open = false;
});
