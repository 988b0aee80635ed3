() => {
  // A result is one video: source, source with the mask's outline, edit, 2 pixels apart. One of the
  // first two is drawn left of the slider's handle, the edit right of it: so they play in step.
  const GAP = 2;
  const draw = () => {
    for (const wipe of document.querySelectorAll(".kvlock-wipe")) {
      const video = wipe.querySelector("video"), canvas = wipe.querySelector("canvas");
      if (video.readyState < 2) continue;
      const width = Math.floor((video.videoWidth - 2 * GAP) / 3), height = video.videoHeight;
      if (canvas.width !== width) canvas.width = width;
      if (canvas.height !== height) canvas.height = height;
      const isOutlined = wipe.querySelector("input[type=checkbox]").checked;
      const first = isOutlined ? width + GAP : 0, last = 2 * (width + GAP);
      const at = Math.round((width * wipe.querySelector("input[type=range]").value) / 1000);
      const pen = canvas.getContext("2d"), rest = width - at;
      if (at) pen.drawImage(video, first, 0, at, height, 0, 0, at, height);
      if (rest) pen.drawImage(video, last + at, 0, rest, height, at, 0, rest, height);
      pen.fillStyle = "#fff";
      pen.fillRect(at - 1, 0, 2, height);
    }
    requestAnimationFrame(draw);
  };
  requestAnimationFrame(draw);
  document.addEventListener("click", (event) => {
    const wipe = event.target.closest(".kvlock-wipe");
    if (!wipe || !event.target.matches("canvas, button")) return;
    const video = wipe.querySelector("video");
    wipe.querySelector("button").textContent = video.paused ? "pause" : "play";
    video.paused ? video.play() : video.pause();
  });
}
