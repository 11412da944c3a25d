"""The words that click itself says, in the product's language.

click asks gettext for its messages through a ``_`` in each of its modules, and gettext would want a compiled catalog
and a Spanish locale on the machine. A few sentences do not deserve that: they are looked up here. A sentence that a
newer click words differently appears in English; nothing else breaks.
"""

from __future__ import annotations

import importlib

import click

from sheily_train.i18n import _

_SENTENCES = {
    "Usage:": _("Uso:"),
    "Options": _("Opciones"),
    "Commands": _("Órdenes"),
    "Positional arguments": _("Argumentos"),
    "Show this message and exit.": _("Muestra esta ayuda y termina."),
    "Show the version and exit.": _("Muestra la versión y termina."),
    "default: {default}": _("por defecto: {default}"),
    "required": _("obligatorio"),
    "Missing command.": _("Falta la orden."),
    "Missing argument": _("Falta el argumento"),
    "Missing option": _("Falta la opción"),
    "Missing parameter": _("Falta el parámetro"),
    "No such option {name!r}.": _("No existe la opción {name!r}."),
    "No such command {name!r}.": _("No existe la orden {name!r}."),
    "Invalid value: {message}": _("Valor no válido: {message}"),
    "Invalid value for {param_hint}: {message}": _("Valor no válido para {param_hint}: {message}"),
    "{value!r} is not a valid {number_type}.": _("{value!r} no es un número válido."),
    "{value} is not in the range {range}.": _("{value} no está en el intervalo {range}."),
    "Option {name!r} does not take a value.": _("La opción {name!r} no lleva valor."),
    "Argument {name!r} takes {nargs} values.": _("El argumento {name!r} lleva {nargs} valores."),
    "{name} {filename!r} does not exist.": _("No existe {filename!r}."),
    "{name} {filename!r} is a file.": _("{filename!r} es un archivo."),
    "{name} {filename!r} is a directory.": _("{filename!r} es una carpeta."),
    "Did you mean {possibility}?": _("¿Quizá {possibility}?"),
    "(Did you mean one of: {possibilities}?)": _("(¿Quizá una de estas: {possibilities}?)"),
    "{value!r} is not {choice}.": _("{value!r} no es {choice}."),
    "{value!r} is not one of {choices}.": _("{value!r} no es uno de {choices}."),
    "Got unexpected extra argument ({args})": _("Sobra un argumento ({args})"),
    "Got unexpected extra arguments ({args})": _("Sobran argumentos ({args})"),
    "Option {name!r} requires an argument.": _("A la opción {name!r} le falta su valor."),
    "Option {name!r} requires {nargs} arguments.": _("A la opción {name!r} le faltan sus {nargs} valores."),
}


def _gettext(message: str) -> str:
    return _SENTENCES.get(message, message)


def _ngettext(singular: str, plural: str, count: int) -> str:
    return _gettext(singular if count == 1 else plural)


def name_placeholders(command: click.Command) -> None:
    """Give a command, and those below it, Spanish words for what stands in its usage line."""
    command.options_metavar = _("[OPCIONES]")
    if isinstance(command, click.Group):
        command.subcommand_metavar = _("ORDEN [ARGUMENTOS]…")
        for below in command.commands.values():
            name_placeholders(below)


def teach_click_spanish() -> None:
    """Let click's modules look their sentences up here."""
    for name in ("core", "decorators", "exceptions", "formatting", "parser", "types"):
        module = importlib.import_module(f"click.{name}")
        for attribute, function in (("_", _gettext), ("ngettext", _ngettext)):
            if hasattr(module, attribute):
                setattr(module, attribute, function)
