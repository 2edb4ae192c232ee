"use strict";
document.documentElement.classList.add("js");

const UNKNOWN_RATE = 25; // frames per second, where the cine does not tell its own

class Player {
  constructor(section) {
    const find = (selector) => section.querySelector(selector);
    this.section = section;
    this.data = JSON.parse(find(".cine-data").textContent);
    this.canvas = find("canvas");
    this.slider = find(".slider");
    this.counter = find(".counter");
    this.phase = find(".phase");
    this.playButton = find(".play");
    this.curve = find(".curve");
    this.cursor = find(".cursor");
    this.speed = 1;
    this.playing = false;
    this.shown = { contours: true, reference: true };
    this.colours = [...section.querySelectorAll(".legend path")].map(
      (line) => getComputedStyle(line).stroke);
    const lines = (frames) => frames?.map((frame) => frame.map((path) => path && new Path2D(path)));
    this.outlines = lines(this.data.paths);
    this.truth = lines(this.data.truth);
    // A frame is cut out at its own size before it is scaled: its neighbours do not shine in.
    this.cut = document.createElement("canvas");
    [this.cut.width, this.cut.height] = this.data.size;
    this.listen(find);
    this.show(this.data.first);
  }

  listen(find) {
    this.slider.addEventListener("input", () => this.seek(this.slider.value - 1));
    this.playButton.addEventListener("click", () => this.toggle());
    this.canvas.addEventListener("click", () => this.toggle());
    find(".previous").addEventListener("click", () => this.seek(this.frame - 1));
    find(".next").addEventListener("click", () => this.seek(this.frame + 1));
    for (const jump of this.section.querySelectorAll(".jump")) {
      jump.addEventListener("click", () => this.seek(Number(jump.dataset.frame)));
    }
    find(".speed").addEventListener("change", (event) => {
      this.speed = Number(event.target.value);
      this.restart();
    });
    for (const name of Object.keys(this.shown)) {
      const button = find(`.toggle.${name}`);
      button?.addEventListener("click", () => {
        this.shown[name] = !this.shown[name];
        button.setAttribute("aria-pressed", this.shown[name]);
        this.draw();
      });
    }
    const follow = (event) => {
      const box = this.curve.getBoundingClientRect();
      const share = (event.clientX - box.left) / box.width;
      this.seek(Math.round(share * (this.data.count - 1)));
    };
    this.curve?.addEventListener("pointerdown", (event) => {
      this.curve.setPointerCapture(event.pointerId);
      follow(event);
    });
    this.curve?.addEventListener("pointermove", (event) => {
      if (this.curve.hasPointerCapture(event.pointerId)) follow(event);
    });
    new ResizeObserver(() => this.fit()).observe(this.canvas);
    const near = new IntersectionObserver((entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      near.disconnect(); // pictures are decoded when their cine comes near
      this.sheets = this.data.pictures.map((uri) => {
        const sheet = new Image();
        sheet.addEventListener("load", () => this.draw());
        sheet.src = uri;
        return sheet;
      });
    }, { rootMargin: "100%" });
    near.observe(this.section);
  }

  fit() {
    const scale = window.devicePixelRatio;
    const width = Math.round(this.canvas.clientWidth * scale);
    if (!width) return; // hidden, as in print
    this.canvas.width = width;
    this.canvas.height = Math.round((width * this.data.box[1]) / this.data.box[0]);
    this.draw();
  }

  seek(frame) {
    this.pause();
    this.show(Math.min(Math.max(frame, 0), this.data.count - 1));
    this.speak();
  }

  show(frame) {
    const { count, fps, phases, area, top, unit } = this.data;
    this.frame = frame;
    this.slider.value = frame + 1;
    const said = [`Frame ${frame + 1} of ${count}`];
    said.push(fps ? `${(frame / fps).toFixed(2)} s` : "frame rate unknown");
    if (area) said.push(`${area[frame].toFixed(unit === "pixels" ? 0 : 1)} ${unit}`);
    this.counter.textContent = said.join(" · ");
    const phase = Object.keys(phases).find((name) => phases[name] === frame);
    this.phase.hidden = !phase;
    this.phase.textContent = phase ?? "";
    if (this.cursor) {
      const [line, dot] = this.cursor.children;
      const x = `${(100 * frame) / Math.max(count - 1, 1)}%`;
      line.setAttribute("x1", x);
      line.setAttribute("x2", x);
      dot.setAttribute("cx", x);
      dot.setAttribute("cy", `${100 - (100 * area[frame]) / top}%`);
    }
    this.draw();
  }

  /** Tells assistive technology where the slider stands; not at every frame while playing. */
  speak() {
    this.slider.setAttribute("aria-valuetext", this.counter.textContent);
  }

  draw() {
    const { cell, size, columns, perSheet } = this.data;
    const sheet = this.sheets?.[Math.floor(this.frame / perSheet)];
    if (!sheet?.complete || !sheet.naturalWidth) return;
    const place = this.frame % perSheet;
    const [width, height] = size;
    this.cut.getContext("2d").drawImage(
      sheet, (place % columns) * cell[0], Math.floor(place / columns) * cell[1], width, height,
      0, 0, width, height);
    const paper = this.canvas.getContext("2d");
    paper.imageSmoothingQuality = "high";
    paper.drawImage(this.cut, 0, 0, this.canvas.width, this.canvas.height);
    if (this.shown.contours && this.outlines) {
      this.drawContours(paper, this.outlines[this.frame], this.colours);
    }
    if (this.shown.reference && this.truth) this.drawContours(paper, this.truth[this.frame], null);
    if (this.data.ruler) this.drawRuler(paper);
  }

  /** Outlines in their colours over a dark halo; without colours dashed and white. */
  drawContours(paper, frame, colours) {
    const { box, stretch } = this.data;
    const scale = new DOMMatrix().scale(
      (this.canvas.width * stretch) / box[0], this.canvas.height / box[1]);
    const pixel = window.devicePixelRatio;
    paper.lineJoin = "round";
    paper.setLineDash(colours ? [] : [4 * pixel, 4 * pixel]);
    for (let i = frame.length - 1; i >= 0; i--) { // the first structure on top
      if (!frame[i]) continue;
      const path = new Path2D();
      path.addPath(frame[i], scale);
      const strokes = colours
        ? [["rgb(0 0 0 / 45%)", 4], [colours[i], 2]]
        : [["rgb(255 255 255 / 85%)", 1.4]];
      for (const [colour, width] of strokes) {
        paper.strokeStyle = colour;
        paper.lineWidth = width * pixel;
        paper.stroke(path);
      }
    }
    paper.setLineDash([]);
  }

  /** One centimetre at the lower right. */
  drawRuler(paper) {
    const pixel = window.devicePixelRatio;
    const { width, height } = this.canvas;
    const length = (this.data.ruler * height) / this.data.box[1];
    const x = Math.round(width - 14 * pixel), y = Math.round(height - 14 * pixel);
    paper.strokeStyle = paper.fillStyle = "rgb(255 255 255 / 80%)";
    paper.lineWidth = 1.5 * pixel;
    paper.beginPath();
    paper.moveTo(x - 5 * pixel, y - length);
    paper.lineTo(x, y - length);
    paper.lineTo(x, y);
    paper.lineTo(x - 5 * pixel, y);
    paper.stroke();
    paper.font = `${11 * pixel}px sans-serif`;
    paper.textAlign = "right";
    paper.textBaseline = "middle";
    paper.fillText("1 cm", x - 8 * pixel, y - length / 2);
  }

  toggle() {
    if (this.playing) this.pause();
    else this.play();
  }

  play() {
    this.playing = true;
    this.label();
    this.restart();
    const run = ++Player.runs;
    this.run = run;
    const step = (now) => {
      if (!this.playing || this.run !== run) return;
      const seconds = Math.max(now - this.started, 0) / 1000;
      const passed = Math.floor(seconds * (this.data.fps ?? UNKNOWN_RATE) * this.speed);
      const frame = (this.from + passed) % this.data.count;
      if (frame !== this.frame) this.show(frame);
      requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  restart() {
    this.from = this.frame;
    this.started = performance.now();
  }

  pause() {
    this.playing = false;
    this.label();
    this.speak();
  }

  label() {
    this.playButton.setAttribute("aria-label", this.playing ? "Pause" : "Play");
    this.playButton.classList.toggle("playing", this.playing);
  }
}
Player.runs = 0;

/** The player that has the focus, else the one nearest to the middle of the window. */
function current(players) {
  const focused = players.find((p) => p.section.contains(document.activeElement));
  if (focused) return focused;
  const away = (p) => {
    const box = p.canvas.getBoundingClientRect();
    return Math.abs((box.top + box.bottom - window.innerHeight) / 2);
  };
  return players.reduce((best, p) => (away(p) < away(best) ? p : best));
}

function press(event, players) {
  if (event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
  const on = event.target.closest("button, select, summary, a, input");
  if (on?.matches("select")) return; // its own keys
  const player = current(players);
  const act = {
    ArrowLeft: () => player.seek(player.frame - 1),
    ArrowRight: () => player.seek(player.frame + 1),
    Home: () => player.seek(0),
    End: () => player.seek(player.data.count - 1),
    " ": on && !on.matches("input") ? null : () => player.toggle(),
  }[event.key];
  if (!act) return;
  event.preventDefault();
  act();
}

document.addEventListener("DOMContentLoaded", () => {
  const players = [...document.querySelectorAll(".cine")].map((section) => new Player(section));
  if (!players.length) return;
  document.addEventListener("keydown", (event) => press(event, players));
  const seen = players[0].canvas.getBoundingClientRect().top < window.innerHeight;
  if (seen && !matchMedia("(prefers-reduced-motion: reduce)").matches) players[0].play();
});
