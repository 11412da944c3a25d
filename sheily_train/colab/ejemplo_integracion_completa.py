"""OMEGA 21 from Python, end to end, in thirteen explained steps.

    python3 sheily_train/colab/ejemplo_integracion_completa.py https://….trycloudflare.com/#token=…
    COLAB_SERVER_URL=https://… python3 sheily_train/colab/ejemplo_integracion_completa.py

It may be started by any Python: without the product's packages it goes on with the checkout's own ``.venv``. Each call
adds to the run «ejemplo»; kill it and call it again, and the worker still has every batch exactly once.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from sheily_train.colab.address import Address
    from sheily_train.colab.client import ClienteColabEntrenamiento
    from sheily_train.core.omega.generator import GeneradorDatosEntrenamiento

CHECKOUT = Path(__file__).resolve().parents[2]
OWN_PYTHON = CHECKOUT / ".venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
RUN = "ejemplo"


def step(number: int, title: str, why: str) -> None:
    """Print a step's heading."""
    print(f"\n{number:>2}. {title}\n    {why}")


def show(text: str) -> None:
    """Print what came of a step."""
    print(f"    → {text}")


def find_worker(argument: str | None) -> Address:
    """Step 1."""
    from sheily_train.colab.address import find_address

    step(1, "Dirección", "La que imprime la celda de Colab: argumento, COLAB_SERVER_URL o .env; lleva el token tras #.")
    address = find_address(argument)
    for warning in address.warnings:
        show(f"Aviso: {warning}")
    show(address.url)
    return address


def get_to_know(client: ClienteColabEntrenamiento) -> int:
    """Steps 2 to 4; the number of the run's last event."""
    step(2, "Conexión", "El cliente toma el entrenamiento a su cargo y reenvía lo que quedó a medias, si algo quedó.")
    answer = client.conectar()
    last = int(answer.get("last_seq", 0))
    show(f"Entrenamiento «{RUN}», con {last} eventos aplicados.")

    step(3, "Diagnóstico", "El trabajador pasa un vector de prueba por las cinco capas.")
    show(f"{client.diagnostico()['status']}")

    step(4, "Arquitectura", "Qué red hay al otro lado.")
    info = client.obtener_info()
    show(f"{info['nombre']} {info['version']}: {info['arquitectura']['parametros_totales']:,} parámetros.")
    return last


def teach(client: ClienteColabEntrenamiento, generator: GeneradorDatosEntrenamiento) -> None:
    """Steps 5 to 8."""
    step(5, "Datos", "Tres clases de vectores de 1600 números; la misma semilla da los mismos bytes.")
    samples = generator.generar_muestras(9 * 64, anomalias=0.1)
    series = generator.generar_series_temporal(64, anomalias=0.2)
    patterns = generator.generar_patrones_neuronales(64, anomalias=0.2)
    for name, batch in (("simple", samples), ("temporal", series), ("neuronal", patterns)):
        show(f"{name}: {len(batch)} vectores, {int((batch.labels == 1).sum())} anomalías.")

    step(6, "Un lote", "Se apunta en el diario, se envía, y se muestra la respuesta cuando también está apuntada.")
    first = client.entrenar_lote(samples[:64])
    show(f"Loss {first['loss']:.6f} · anomalía {first['anomaly_prob']:.2%}")

    step(
        7,
        "Muchos lotes",
        "Van encadenados, para que la red no espere; tras un corte no se repite ni se pierde ninguno.",
    )
    answers = client.entrenar_multiples_lotes(samples[64:], tamano_lote=64)
    show(f"{len(answers)} lotes; loss {answers[0]['loss']:.6f} al principio, {answers[-1]['loss']:.6f} al final.")

    step(8, "Feedback dendrítico", "Si la pérdida bajó, los 16 ajustes valieron, y la red se acerca a ellos.")
    good = answers[-1]["loss"] < first["loss"]
    reply = client.enviar_feedback(answers[-1]["dendrites"], validacion=good)
    show(f"{reply['status']}, validado: {'sí' if reply['validacion'] else 'no'}")


def look(client: ClienteColabEntrenamiento, generator: GeneradorDatosEntrenamiento) -> None:
    """Steps 9 to 11."""
    import numpy as np

    step(9, "Estado", "Lo que el trabajador ha hecho; responde también mientras entrena.")
    state = client.obtener_estado()["estadisticas"]
    show(f"{state['total_muestras']} muestras en {state['total_batches']} lotes, en {state['dispositivo']}.")

    step(10, "Métricas", "Las últimas pérdidas y hacia dónde van.")
    metrics = client.obtener_metricas()
    show(f"Tendencia: {metrics['tendencia']}; anomalías detectadas: {metrics['anomalias_detectadas']}")

    step(11, "Predicción", "Vectores que nunca vio, sin aprender de ellos.")
    fresh = generator.generar_muestras(200, anomalias=0.1)
    verdict = client.predecir(fresh)
    found, true = np.array(verdict["anomaly_prob"]) > verdict["threshold"], fresh.labels == 1
    show(f"Encontró {int((found & true).sum())} de {int(true.sum())} anomalías; {int((found & ~true).sum())} falsas.")


def close(client: ClienteColabEntrenamiento) -> None:
    """Step 12."""
    step(12, "Resumen", "Lo de esta llamada, y el historial lote a lote.")
    client.mostrar_resumen()
    show(f"{len(client.obtener_historial())} respuestas en el historial.")


def report(log: Path) -> None:
    """Step 13."""
    from sheily_train.colab.report import write_report

    step(13, "Informe", "El mismo registro da una página con gráficas, un JSON y un Markdown.")
    for file in write_report(log, log.with_suffix(".html")):
        show(str(file))


def run(argument: str | None) -> None:
    """The thirteen steps."""
    from sheily_train import paths
    from sheily_train.colab.client import ClienteColabEntrenamiento
    from sheily_train.core.omega.generator import GeneradorDatosEntrenamiento
    from sheily_train.runlog import RunLog, whole_lines

    print("OMEGA 21: entrenamiento remoto en trece pasos")
    address = find_worker(argument)
    path = paths.logs_dir() / f"omega_{RUN}.jsonl"
    with (
        RunLog(path, keep=whole_lines(path)) as log,
        ClienteColabEntrenamiento(address.url, address.token, run=RUN, seed=42, record=log.write) as client,
    ):
        last = get_to_know(client)
        generator = GeneradorDatosEntrenamiento((42, last))
        teach(client, generator)
        look(client, generator)
        close(client)
        log.write("done", run=RUN)
    report(path)
    print("\n✅ Ejemplo completo")


def main() -> NoReturn:
    """Run the example with this process's argument."""
    sys.path[0] = str(CHECKOUT)
    if any(importlib.util.find_spec(name) is None for name in ("httpx2", "numpy", "safetensors")):
        if OWN_PYTHON.is_file() and Path(sys.executable) != OWN_PYTHON:
            os.execv(OWN_PYTHON, [str(OWN_PYTHON), __file__, *sys.argv[1:]])  # noqa: S606
        sys.exit("Error: faltan los paquetes de Sheily Train. Instálalos con: make install")
    from sheily_train.errors import SheilyError

    try:
        run(sys.argv[1] if len(sys.argv) > 1 else None)
    except SheilyError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("Interrumpido; lo enviado está en el diario. La misma orden sigue.", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


if __name__ == "__main__":
    main()
