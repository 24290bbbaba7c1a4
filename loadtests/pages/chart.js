// The chart below the Joules tab of Locust's web interface: J/query over time, drawn anew every second.
const INK = { active_j: ["#00ca5a", "active"], allocated_j: ["#ff9f00", "allocated"] };
const WIDTH = 1000, HEIGHT = 200, LEFT = 60, BOTTOM = 30, TOP = 30;

const panel = document.createElement("section");
panel.id = "wattle-chart";
// Fixed: the interface fills the window by itself, and what comes after it would be out of sight.
panel.style.cssText = "position:fixed;left:0;right:0;bottom:0;padding:0 2rem .5rem;font-family:sans-serif;display:none";
document.body.append(panel);

function draw(points) {
  const first = points[0].at_s, last = points.at(-1).at_s;
  const top = 1.1 * Math.max(...points.flatMap((p) => [p.active_j || 0, p.allocated_j || 0])) || 1;
  const x = (s) => LEFT + ((s - first) / (last - first)) * (WIDTH - LEFT - 10);
  const y = (j) => HEIGHT - BOTTOM - (j / top) * (HEIGHT - BOTTOM - TOP);
  const parts = [];
  for (let i = 0; i <= 4; i++) {
    const j = (top * i) / 4;
    parts.push(`<line x1="${LEFT}" x2="${WIDTH - 10}" y1="${y(j)}" y2="${y(j)}" stroke="#8884"/>`);
    parts.push(`<text x="${LEFT - 6}" y="${y(j) + 4}" text-anchor="end">${j.toPrecision(2)}</text>`);
    const s = first + ((last - first) * i) / 4;
    parts.push(`<text x="${x(s)}" y="${HEIGHT - 8}" text-anchor="${i == 4 ? "end" : "middle"}">${s.toFixed(0)} s</text>`);
  }
  Object.entries(INK).forEach(([key, [colour, name]], i) => {
    const known = points.filter((p) => p[key] !== null);
    const path = known.map((p) => `${x(p.at_s)},${y(p[key])}`).join(" ");
    parts.push(`<polyline points="${path}" fill="none" stroke="${colour}" stroke-width="2"/>`);
    parts.push(`<text x="${LEFT + 10 + 110 * i}" y="18" style="fill:${colour}">■ ${name}</text>`);
  });
  return `<svg viewBox="0 0 ${WIDTH} ${HEIGHT}" style="width:100%;font-size:12px;fill:#888">${parts.join("")}</svg>`;
}

function isChosen() {
  return new URLSearchParams(location.search).get("tab") === "joules";
}

async function refresh() {
  const points = isChosen() ? await (await fetch("./wattle/history")).json() : [];
  panel.style.display = points.length > 1 ? "" : "none";
  if (points.length < 2) return;
  panel.style.background = getComputedStyle(document.body).backgroundColor;
  panel.innerHTML = `<h3 style="color:#888">Joules per query, last 5 s</h3>${draw(points)}`;
}

setInterval(refresh, 1000);
