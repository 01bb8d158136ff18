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

// A vote counts at once; where that does not go, the form is sent and the server's page says why.
document.addEventListener("submit", async (event) => {
  const form = event.target.closest("form[data-vote]");
  if (!form) return;
  event.preventDefault();
  const body = new URLSearchParams(new FormData(form));
  const answer = await fetch(form.action, {method: "POST", body, headers: {Accept: "application/json"}}).catch(() => null);
  if (!answer || !answer.ok) { form.submit(); return; }
  const {votes, voted} = await answer.json();
  const shown = form.parentElement.querySelector("[data-votes]");
  shown.textContent = votes;
  shown.nextSibling.textContent = votes === 1 ? " vote" : " votes";
  form.querySelector("[data-verb]").textContent = voted ? "Take vote back" : "Vote";
  form.elements.wanted.value = voted ? "no" : "yes";
});

// A fold opens where a link leads into it.
const unfold = () => {
  const linked = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let fold = linked && linked.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (linked) linked.scrollIntoView();
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
