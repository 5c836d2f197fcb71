// Copies commands. Without scripts the page lacks only its buttons: it shows every command as text.
for (const button of document.querySelectorAll("button.copy")) {
  button.hidden = false;
  const label = button.textContent;
  button.addEventListener("click", async () => {
    const command = button.dataset.command ?? button.previousElementSibling.textContent;
    let done = true;
    try {
      await navigator.clipboard.writeText(command);
    } catch {
      // A page opened from a file may not reach the clipboard directly.
      const area = document.createElement("textarea");
      area.value = command;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Not copied";
    setTimeout(() => { button.textContent = label; }, 1500);
  });
}
