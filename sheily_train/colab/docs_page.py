"""The page at ``/docs``: it holds no data, takes the token from its address or a field, and shows Swagger UI."""

from __future__ import annotations

DOCS_PAGE = """<!doctype html>
<html lang="es">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>OMEGA 21: documentación</title>
<link rel="stylesheet" href="https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui.css">
<style>
  body { font-family: sans-serif; margin: 0 auto; max-width: 80rem; padding: 1rem; }
  input { width: 30rem; max-width: 90%; padding: .4rem; }
  #notice { color: #a00; }
</style>
</head>
<body>
<form id="form" hidden>
  <h1>OMEGA 21</h1>
  <label>Token del trabajador (lo que sigue a «#token=» en su dirección)<br>
    <input id="token" type="password" autocomplete="off" autofocus></label>
  <button>Abrir</button>
</form>
<p id="notice" role="alert"></p>
<div id="ui"></div>
<script>
const form = document.getElementById("form"), field = document.getElementById("token");
const notice = document.getElementById("notice");
const noUI = "No se pudo cargar Swagger UI: hace falta acceso a cdn.jsdelivr.net. " +
  "La descripción de la API está en /openapi.json (con la cabecera Authorization: Bearer).";

function loadUI() {
  return new Promise((done, failed) => {
    const script = document.createElement("script");
    script.src = "https://cdn.jsdelivr.net/npm/swagger-ui-dist@5/swagger-ui-bundle.js";
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
}

async function open(token) {
  const headers = token ? {Authorization: "Bearer " + token} : {};
  let answer;
  try {
    answer = await fetch("openapi.json", {headers});
  } catch {
    notice.textContent = "El trabajador no responde.";
    return;
  }
  if (!answer.ok) {
    form.hidden = false;
    notice.textContent = token ? "El trabajador no acepta ese token." : "";
    return;
  }
  const spec = await answer.json();
  form.hidden = true;
  notice.textContent = "";
  try {
    if (!window.SwaggerUIBundle) await loadUI();
  } catch {
    notice.textContent = noUI;
    return;
  }
  SwaggerUIBundle({spec, dom_id: "#ui", requestInterceptor: (request) => {
    Object.assign(request.headers, headers);
    return request;
  }});
}

form.addEventListener("submit", (event) => { event.preventDefault(); open(field.value.trim()); });
const handed = new URLSearchParams(location.hash.slice(1)).get("token") || "";
if (handed) history.replaceState(null, "", location.pathname);
open(handed);
</script>
</body>
</html>
"""
