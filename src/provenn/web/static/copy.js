// The list of a static copy: search, filters and order over what is on the page.
"use strict";

const form = document.querySelector("form[data-copy]");
if (form) {
  const results = document.querySelector(form.dataset.copy);
  const months = [...results.querySelectorAll("ol.papers")].map((list) => ({
    list,
    heading: list.previousElementSibling,
    papers: [...list.children].map((item) => ({item, ...JSON.parse(item.dataset.paper)})),
  }));
  const every = months.flatMap((month) => month.papers);
  const ranked = document.createElement("ol"), none = results.querySelector("[data-none]"), count = results.querySelector("[data-count]");
  ranked.className = "papers";
  results.append(ranked);
  const plain = (text) => text.toLowerCase().replace(/[-_]/g, "").replace(/[^\p{L}\p{N}.]+/gu, " ");
  const fits = (paper, asked) =>
    plain(asked.q || "").split(" ").every((word) => paper.words.includes(word)) &&
    ["task", "slot", "tag", "has", "verdict"].every((name) => !asked[name] || paper[name].includes(asked[name]));

  const show = () => {
    const asked = Object.fromEntries([...new FormData(form)].filter(([, value]) => value));
    const kept = new Set(every.filter((paper) => fits(paper, asked)));
    const byDate = asked.sort === "date";
    for (const {list, heading, papers} of months) {
      const shown = byDate ? papers.filter((paper) => kept.has(paper)) : [];
      list.replaceChildren(...shown.map((paper) => paper.item));
      list.hidden = heading.hidden = !shown.length;
    }
    if (!byDate) ranked.replaceChildren(...[...kept].sort((a, b) => b.share - a.share).map((paper) => paper.item));
    ranked.hidden = byDate;
    none.hidden = kept.size > 0;
    count.textContent = kept.size + (kept.size === 1 ? " paper" : " papers");
    if (byDate) delete asked.sort;
    const query = new URLSearchParams(asked);
    history.replaceState(null, "", location.pathname + (query.size ? "?" + query : ""));
  };

  for (const [name, value] of new URLSearchParams(location.search)) {
    const field = form.elements[name];
    if (!field) continue;
    if (field.type === "select-one" && ![...field.options].some((option) => option.value === value)) field.add(new Option(value));
    field.value = value;
  }
  form.hidden = false;
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => { event.preventDefault(); show(); });
  if (location.search) show();
}
