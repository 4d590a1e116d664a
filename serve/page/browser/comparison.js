// The position of the swipe and the opacity of the overlay of a comparison.

document.addEventListener("input", ({ target }) => {
  if (target.matches?.(".comparison input[type=range]")) {
    target.closest("figure").style.setProperty("--position", `${target.value}%`);
  }
});
