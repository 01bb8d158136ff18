// What makes the pages immediate. Everything here also works without it.
"use strict";

// The list: what is typed or chosen shows at once, and every state is an address.
for (const form of document.querySelectorAll("form[data-live]")) {
  const target = document.querySelector(form.dataset.live);
  let waiting = null, turn = 0;
  const show = async (push) => {
    const query = new URLSearchParams();
    for (const [name, value] of new FormData(form)) if (value) query.set(name, value);
    const address = form.action.split("?")[0] + (query.size ? "?" + query : "");
    const mine = ++turn;
    const answer = await fetch(address, {headers: {Accept: "text/html"}});
    if (!answer.ok || mine !== turn) return;
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    target.replaceChildren(...page.querySelector(form.dataset.live).childNodes);
    if (push) history.replaceState(null, "", address);
  };
  form.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(() => show(true), 150); });
  form.addEventListener("submit", (event) => { event.preventDefault(); clearTimeout(waiting); show(true); });
}

// A fold opens where a link leads into it.
const unfold = () => {
  const place = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let fold = place && place.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (place) place.scrollIntoView();
};
addEventListener("hashchange", unfold);
unfold();

// Listings can be copied.
for (const listing of document.querySelectorAll("pre.copied")) {
  const button = document.createElement("button");
  button.type = "button"; button.className = "quiet copy"; button.textContent = "Copy";
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(listing.querySelector("code").textContent);
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 2000);
  });
  listing.before(button);
}
