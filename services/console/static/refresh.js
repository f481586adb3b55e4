// Shows the page's figures anew every few seconds, in place; what is folded open stays so.
const EVERY_MS = 5000;

async function refresh() {
  if (document.hidden) return;
  const answer = await fetch(location.href);
  if (!answer.ok) return;
  const fresh = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
  const shown = document.querySelector("main");
  const open = [...shown.querySelectorAll("details")].map((fold) => fold.open);
  [...fresh.querySelectorAll("details")].forEach((fold, place) => {
    if (place < open.length) fold.open = open[place];
  });
  if (fresh.innerHTML !== shown.innerHTML) shown.replaceWith(fresh);
}

setInterval(() => refresh().catch(() => {}), EVERY_MS); // the console is away for a moment: the next one shows it
