// Open a page in Chromium, use it, and write what was seen to standard output as JSON: node page.js CHROMIUM FILE
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";
import { chromium } from "playwright-core";

const [executablePath, file] = process.argv.slice(2);
const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf-8");
const address = pathToFileURL(file).href;
const args = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"];
const browser = await chromium.launch({ executablePath, args });
const seen = { errors: [], requests: [], faults: [], wider: {} };

// The page's policy lets no script of ours in, so axe is brought in with the policy off; requests are watched with it on.
for (const [colorScheme, bypassCSP] of [["light", false], ["dark", true], ["light", true]]) {
  const context = await browser.newContext({ colorScheme, bypassCSP, viewport: { width: 1100, height: 900 } });
  const page = await context.newPage();
  page.on("console", (message) => message.type() === "error" && seen.errors.push(message.text()));
  page.on("pageerror", (error) => seen.errors.push(String(error)));
  page.on("request", (request) => request.url() !== address && seen.requests.push(request.url()));
  await page.goto(address);
  if (bypassCSP) {
    await page.evaluate(axe);
    const result = await page.evaluate(() => window.axe.run());
    for (const { id, impact, nodes } of result.violations)
      if (["serious", "critical"].includes(impact)) seen.faults.push(`${colorScheme}: ${id}: ${nodes[0].html}`);
  } else {
    seen.title = await page.title();
    seen.verdict = await page.textContent(".verdict");
    seen.scripts = await page.evaluate(() => window.hacked === undefined && !document.querySelector("main img"));
    seen.shown = {};
    for (const button of await page.$$("#answer-filters button")) {
      await button.click();
      while (await page.isVisible("#answer-more")) await page.click("#answer-more");
      seen.shown[await button.getAttribute("data-filter")] = await page.$$eval("#answer-list article", (all) => all.length);
    }
    if (await page.$("#answer-search")) {
      await page.fill("#answer-search", "no answer holds this");
      seen.shown.nothing = await page.$$eval("#answer-list article", (all) => all.length);
    }
    if (await page.$("#step")) {
      await page.fill("#step", "1");
      seen.steps = await page.$$eval("#completion-list article p.quiet", (all) => [...new Set(all.map((p) => p.textContent.split(",")[0]))]);
    }
    for (const width of [360, 1100]) {
      await page.setViewportSize({ width, height: 800 });
      seen.wider[width] = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    }
  }
  await context.close();
}
await browser.close();
process.stdout.write(JSON.stringify(seen));
