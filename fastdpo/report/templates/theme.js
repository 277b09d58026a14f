"use strict";
const kept = {
  get(name) { try { return localStorage.getItem(name); } catch { return null; } },
  set(name, value) { try { localStorage.setItem(name, value); } catch { /* a file may have no storage */ } },
};
const root = document.documentElement;
if (["light", "dark"].includes(kept.get("fastdpo-theme"))) root.dataset.theme = kept.get("fastdpo-theme");
