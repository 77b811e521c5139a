// Filters the gallery. Without scripts the page shows every card and no filter.
(() => {
  const cards = [...document.querySelectorAll(".gallery > li")];
  if (!cards.length) return;
  document.querySelectorAll(".needs-script").forEach((e) => e.classList.remove("needs-script"));
  const status = document.getElementById("by-status");
  const group = document.getElementById("by-group");
  const words = document.getElementById("by-words");
  const shown = document.getElementById("shown");
  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const card of cards) {
      const keep =
        (!status?.value || card.dataset.status === status.value) &&
        (!group?.value || card.dataset.group === group.value) &&
        wanted.every((w) => card.dataset.search.includes(w));
      card.hidden = !keep;
      count += keep;
    }
    shown.textContent = `${count} of ${cards.length} shown`;
  };
  for (const control of [status, group, words]) control?.addEventListener("input", apply);
  apply();
})();
