// Demos without leaving the page. Without a script each has a page of its own that refreshes itself.
"use strict";
(() => {
  // Two pictures of one size become one, and a range says how much of which is seen.
  const slide = (outcome) => {
    for (const pair of outcome.querySelectorAll("[data-compare]:not(.slid)")) {
      const label = document.createElement("label"), range = document.createElement("input");
      range.type = "range"; range.min = 0; range.max = 100; range.value = 50;
      const names = [...pair.querySelectorAll("figcaption")].map((each) => each.firstChild.textContent.trim().replace(/ \($/, ""));
      label.append(`${names[0]} on the left, ${names[1][0].toLowerCase() + names[1].slice(1)} on the right`, range);
      const show = () => pair.style.setProperty("--at", range.value + "%");
      range.addEventListener("input", show);
      pair.classList.add("slid");
      pair.after(label);
      label.className = "slider";
      show();
    }
  };
  const pause = (milliseconds) => new Promise((done) => setTimeout(done, milliseconds));

  const load = async (address, outcome) => {
    const answer = await fetch(address, {headers: {Accept: "text/html"}});
    const page = new DOMParser().parseFromString(await answer.text(), "text/html");
    const tried = page.querySelector("#tried");
    if (tried) outcome.replaceChildren(tried);
    else refuse(outcome, page.querySelector("main .lead")?.textContent || "The server did not answer.");
    slide(outcome);
    return tried;
  };
  const refuse = (outcome, words) => {
    const line = document.createElement("p");
    line.className = "refused"; line.setAttribute("role", "alert"); line.textContent = words;
    outcome.replaceChildren(line);
  };

  // Follow a demo that is not over: text as it comes, else its position in the queue, and in the end the answer.
  const follow = async (outcome) => {
    let tried = outcome.querySelector("#tried");
    while (tried && !["done", "failed"].includes(tried.dataset.state)) {
      const line = tried.querySelector(".place"), code = tried.querySelector(".written code");
      const turn = (at) => { const words = at ? `Place ${at} in the queue.` : "It runs."; if (line.textContent !== words) line.textContent = words; };
      if (tried.dataset.streams !== undefined) {
        code.textContent = "";
        await new Promise((done) => {
          const events = new EventSource(tried.dataset.at + "/events");
          events.addEventListener("place", (event) => turn(JSON.parse(event.data)));
          events.addEventListener("text", (event) => code.append(JSON.parse(event.data)));
          for (const name of ["end", "error"]) events.addEventListener(name, () => { events.close(); done(); });
        });
      } else {
        for (let waited = 200, over = false; !over; waited = Math.min(1.3 * waited, 2000)) {
          await pause(waited);
          const answer = await fetch("/api" + tried.dataset.at);
          if (!answer.ok) break;
          const now = await answer.json();
          turn(now.place);
          over = ["done", "failed"].includes(now.state);
        }
      }
      await pause(100);
      tried = await load(tried.dataset.at, outcome);
    }
  };

  for (const form of document.querySelectorAll("form[data-try]")) {
    const outcome = form.parentElement.querySelector(".outcome"), button = form.querySelector("button");
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      const file = form.querySelector("input[type=file]")?.files[0];
      if (file && file.size > Number(form.dataset.most)) {
        refuse(outcome, `The file is larger than ${form.dataset.most / 1048576} MB: give a smaller one.`);
        return;
      }
      button.disabled = true;
      try {
        const answer = await fetch(form.action, {method: "POST", body: new FormData(form), headers: {Accept: "text/html"}});
        const page = new DOMParser().parseFromString(await answer.text(), "text/html");
        const tried = page.querySelector("#tried");
        if (tried) { outcome.replaceChildren(tried); slide(outcome); await follow(outcome); }
        else refuse(outcome, page.querySelector("main .lead")?.textContent || "The server did not answer.");
      } catch (error) {
        refuse(outcome, "The server could not be reached: try again.");
      } finally {
        button.disabled = false;
      }
    });
    // A file of one's own goes before a sample.
    const file = form.querySelector("input[type=file]"), words = form.querySelector("textarea");
    const picked = form.querySelectorAll("input[name=sample]");
    const unpick = (given) => { if (given) for (const each of picked) each.checked = false; };
    file?.addEventListener("change", () => unpick(file.files.length));
    words?.addEventListener("input", () => unpick(words.value.trim()));
    for (const each of picked) each.addEventListener("change", () => { if (file) file.value = ""; if (words) words.value = ""; });
  }
  for (const outcome of document.querySelectorAll("main > .outcome")) { slide(outcome); follow(outcome); }
})();
