const cards = [...document.querySelectorAll("article")];
const filter = document.getElementById("filter");
let saved = true;

function isUsed(card) {
  const decision = review[card.dataset.number].decision;
  return decision ? decision === "accept" : card.dataset.measured === "accepted";
}

function isShown(card) {
  const decision = review[card.dataset.number].decision;
  switch (filter.value) {
    case "all": return true;
    case "use": return isUsed(card);
    case "leave": return !isUsed(card);
    case "open": return !decision;
    case "accept": case "reject": return decision === filter.value;
    default: return card.dataset.measured === filter.value;
  }
}

function refresh(card) {
  const decision = review[card.dataset.number].decision;
  card.dataset.use = isUsed(card);
  for (const button of card.querySelectorAll("button")) {
    button.setAttribute("aria-pressed", button.dataset.decision === decision);
  }
}

function count() {
  document.getElementById("tally").textContent = `Training uses ${cards.filter(isUsed).length} of ${cards.length}.` +
    (saved ? "" : " Not downloaded yet.");
}

function decide(card, decision) {
  const row = review[card.dataset.number];
  row.decision = row.decision === decision ? "" : decision;
  saved = false;
  refresh(card);
  count();
}

function show() {
  for (const card of cards) card.hidden = !isShown(card);
}

function quoted(text) {
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function asTable() {
  const rows = review.map((row) => [row.image, row.decision, row.comment.replace(/\s+/g, " ").trim()]);
  return [["image", "decision", "comment"], ...rows].map((row) => row.map(quoted).join(",") + "\n").join("");
}

function move(card, step) {
  const shown = cards.filter((each) => !each.hidden);
  const next = shown[card ? shown.indexOf(card) + step : 0];
  if (next) { next.focus(); next.scrollIntoView({ block: "nearest" }); }
}

for (const card of cards) {
  refresh(card);
  for (const button of card.querySelectorAll("button")) {
    button.addEventListener("click", () => decide(card, button.dataset.decision));
  }
  card.querySelector("input").addEventListener("input", (event) => {
    review[card.dataset.number].comment = event.target.value;
    saved = false;
    count();
  });
}
count();
filter.addEventListener("change", show);
document.getElementById("download").addEventListener("click", () => {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([asTable()], { type: "text/csv" }));
  link.download = "review.csv";
  link.click();
  URL.revokeObjectURL(link.href);
  saved = true;
  count();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select")) return;
  const card = document.activeElement.closest("article");
  if (event.key === "j") move(card, 1);
  else if (event.key === "k") move(card, -1);
  else if (card && event.key === "a") decide(card, "accept");
  else if (card && event.key === "r") decide(card, "reject");
  else if (card && event.key === "u") decide(card, review[card.dataset.number].decision);
  else return;
  event.preventDefault();
});
window.addEventListener("beforeunload", (event) => { if (!saved) event.preventDefault(); });
