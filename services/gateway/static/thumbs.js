// Thumbs on a web page. Load it from the gateway, then call thumbs(element, token) with the answer's
// X-Thumbwheel-Feedback-Token; elements that have data-feedback-token when the page is loaded get theirs by themselves.
(() => {
  const url = new URL("/v1/feedback", document.currentScript.src);
  const show = (button, isPressed) => {
    button.setAttribute("aria-pressed", isPressed);
    button.style.opacity = isPressed ? 1 : 0.5;
  };
  window.thumbs = (element, token) => {
    const say = document.createElement("span");
    say.setAttribute("role", "status");
    let given = "";
    const buttons = [["up", "👍"], ["down", "👎"]].map(([value, sign]) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = sign;
      button.title = "thumb " + value;
      button.setAttribute("aria-label", button.title);
      show(button, false);
      button.onclick = async () => {
        const wanted = given === value ? "retract" : value; // a second click takes it back
        const body = JSON.stringify({ value: wanted, token });
        const headers = { "Content-Type": "application/json" };
        say.textContent = "";
        for (const other of buttons) other.disabled = true;
        try {
          const answer = await fetch(url, { method: "POST", headers, body });
          if (!answer.ok) throw Error((await answer.json()).error.message);
          given = wanted;
        } catch (error) {
          say.textContent = error.message;
        }
        for (const other of buttons) other.disabled = false;
        buttons.forEach((other, n) => show(other, given === ["up", "down"][n]));
      };
      return button;
    });
    element.append(...buttons, say);
  };
  addEventListener("DOMContentLoaded", () => {
    for (const element of document.querySelectorAll("[data-feedback-token]"))
      thumbs(element, element.dataset.feedbackToken);
  });
})();
