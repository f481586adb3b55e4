// thumbs(element, token) adds thumbs; the token is the answer's X-Thumbwheel-Feedback-Token. Elements that have a
// data-feedback-token when the page is loaded get theirs.
(() => {
  const url = new URL("/v1/feedback", document.currentScript.src);
  const path = "M7 11v9H4v-9zM7 11l4-8c2 0 3 1 2 3l-1 3h6c1 0 2 1 2 3l-2 6c0 1-1 2-2 2H7";
  const values = ["up", "down"];
  window.thumbs = (element, token) => {
    const status = document.createElement("span");
    status.setAttribute("role", "status");
    let given;
    const show = (isBusy) =>
      buttons.forEach((button, n) => {
        const isGiven = given === values[n];
        button.disabled = isBusy;
        button.setAttribute("aria-pressed", isGiven);
        button.firstChild.style.fill = isGiven ? "gold" : "none";
      });
    const buttons = values.map((value, n) => {
      const button = document.createElement("button");
      button.type = "button";
      button.ariaLabel = button.title = "thumb " + value;
      button.innerHTML = `<svg viewBox="0 0 24 24" width="20" stroke="currentColor" transform="rotate(${n * 180})"><path d="${path}"/></svg>`;
      button.onclick = async () => {
        const wanted = given === value ? "retract" : value; // a second click takes it back
        const body = JSON.stringify({ value: wanted, token, feedback_id: "" + Date.now() });
        status.textContent = "";
        show(true);
        try {
          const answer = await fetch(url, { method: "POST", body }); // as text, so without a preflight
          if (!answer.ok) throw Error((await answer.json()).error.message);
          given = wanted;
        } catch (error) {
          status.textContent = " " + error.message;
        }
        show(false);
      };
      return button;
    });
    element.append(...buttons, status);
    show(false);
  };
  addEventListener("DOMContentLoaded", () => {
    for (const element of document.querySelectorAll("[data-feedback-token]"))
      thumbs(element, element.dataset.feedbackToken);
  });
})();
