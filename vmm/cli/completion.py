"""`pyvmm completion SHELL`: what makes bash, zsh or fish complete pyvmm's command line.

The scripts are text made from the parsers; they ask no pyvmm anything while somebody types.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from vmm.cli.grammar import SHELLS, Command, Option, commands, with_a_runs
from vmm.cli.output import printing
from vmm.cli.parsers import completion_parser as parser
from vmm.core.errors import UsageError
from vmm.core.near import did_you_mean


def run(words: Sequence[str]) -> int:
    """The whole command; the exit status. Raises UsageError."""
    shell = parser().parse_args(words).shell
    if shell not in SHELLS:
        remedy = did_you_mean(shell, SHELLS) or f"give one of {', '.join(SHELLS)}"
        raise UsageError(f"completion for {shell}: {remedy}; see pyvmm completion --help")
    text = script(shell)
    with printing():
        print(text, end="")
    return 0


def script(shell: str) -> str:
    """The completion script for one of SHELLS."""
    known = commands()
    by_name = {command.name: command for command in known}
    by_name["lab"] = with_a_runs(by_name["lab"], by_name["run"])
    by_name["measure"] = with_a_runs(by_name["measure"], by_name["run"])
    makers = {"bash": _bash, "zsh": _zsh, "fish": _fish}
    return "\n".join(makers[shell](list(by_name.values()))) + "\n"


# -- bash -----------------------------------------------------------------------------------------


def _bash(known: Sequence[Command]) -> Iterator[str]:
    names = " ".join(command.name for command in known)
    yield "# bash completion for pyvmm, made by: pyvmm completion bash"
    yield "_pyvmm() {"
    yield "  local cur=${COMP_WORDS[COMP_CWORD]} before=$((COMP_CWORD - 1)) command=run place=0 i"
    # "--private-mem=x" is three words here, as "=" breaks them.
    yield '  if [[ $cur == "=" ]]; then cur=; fi'
    yield '  if [[ ${COMP_WORDS[before]} == "=" ]]; then before=$((before - 1)); fi'
    yield "  local prev=${COMP_WORDS[before]}"
    yield f'  local names=" {names} "'
    yield '  if ((COMP_CWORD > 1)) && [[ $names == *" ${COMP_WORDS[1]} "* ]]; then'
    yield "    command=${COMP_WORDS[1]}"
    yield "  fi"
    yield "  for ((i = 2; i < COMP_CWORD; i++)); do"
    yield "    if [[ ${COMP_WORDS[i]} != -* ]]; then place=$((place + 1)); fi"
    yield "  done"
    yield '  local words="" files=""'
    yield '  case "$command $prev" in'
    for command in known:
        for option in command.options:
            if option.metavar:
                pattern = " | ".join(f'"{command.name} {name}"' for name in option.names)
                yield f"    {pattern}) words={_quoted(option.words)} files={_flag(option)} ;;"
    yield "    *)"
    yield '      case "$command $place" in'
    for command in known:
        for place, words in enumerate(command.positions):
            last = place == len(command.positions) - 1 and not words
            pattern = f'"{command.name} "*' if last else f'"{command.name} {place}"'
            yield f"        {pattern}) words={_quoted(words)} files={'' if words else 1} ;;"
    yield "      esac"
    yield "      if [[ $cur == -* ]]; then"
    yield "        files="
    yield '        case "$command" in'
    for command in known:
        yield f"          {command.name}) words={_quoted(command.option_names)} ;;"
    yield "        esac"
    yield "      elif ((COMP_CWORD == 1)); then"
    yield f"        words={_quoted([command.name for command in known])}"
    yield "      fi"
    yield "      ;;"
    yield "  esac"
    yield "  COMPREPLY=()"
    yield '  if [[ -n $words ]]; then COMPREPLY=($(compgen -W "$words" -- "$cur")); fi'
    yield "  if [[ -n $files ]]; then"
    yield "    compopt -o filenames 2>/dev/null"
    yield "    local IFS=$'\\n'"
    yield '    COMPREPLY+=($(compgen -f -- "$cur"))'
    yield "  fi"
    yield "}"
    yield "complete -F _pyvmm pyvmm"


def _quoted(words: Sequence[str]) -> str:
    return '"' + " ".join(words) + '"'


def _flag(option: Option) -> str:
    return "1" if option.names_files else ""


# -- zsh ------------------------------------------------------------------------------------------


def _zsh(known: Sequence[Command]) -> Iterator[str]:
    yield "#compdef pyvmm"
    yield "# zsh completion for pyvmm, made by: pyvmm completion zsh"
    yield "_pyvmm() {"
    yield "  local -a commands=("
    for command in known:
        yield f"    {_single(f'{command.name}:{command.summary}')}"
    yield "  )"
    yield "  local command=run"
    yield "  if ((CURRENT > 2)) && [[ -n ${(M)commands:#${words[2]}:*} ]]; then"
    yield "    command=$words[2]"
    yield "    shift words"
    yield "    ((CURRENT--))"
    yield "  elif ((CURRENT == 2)) && [[ $words[2] != -* ]]; then"
    yield "    _describe command commands"
    yield "    return"
    yield "  fi"
    yield "  case $command in"
    for command in known:
        yield f"    {command.name})"
        lines = [_single(word) for option in command.options for word in _zsh_option(option)]
        for place, words in enumerate(command.positions):
            last = place == len(command.positions) - 1 and not words
            action = f"({' '.join(words)})" if words else "_files"
            lines.append(_single(f"{'*' if last else place + 1}:{command.name}:{action}"))
        yield "      _arguments " + " \\\n        ".join(lines or ["':::'"])
        yield "      ;;"
    yield "  esac"
    yield "}"
    yield 'if [[ $funcstack[1] == _pyvmm ]]; then _pyvmm "$@"; else compdef _pyvmm pyvmm; fi'


def _zsh_option(option: Option) -> Iterator[str]:
    about = _zsh_text(option.help)
    action = f"({' '.join(option.words)})" if option.words else "_files" if _flag(option) else ""
    for name in option.names:
        repeat = "*" if option.is_repeatable else ""
        if not option.metavar:
            yield f"{repeat}{name}[{about}]"
            continue
        # An option that may stand alone takes its value after "=" only.
        form = f"{name}=-" if option.is_optional else f"{name}="
        colon = "::" if option.is_optional else ":"
        yield f"{repeat}{form}[{about}]{colon}{_zsh_text(option.metavar)}:{action}"


def _zsh_text(text: str) -> str:
    for character in "\\:[]":
        text = text.replace(character, f"\\{character}")
    return text


def _single(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


# -- fish -----------------------------------------------------------------------------------------


def _fish(known: Sequence[Command]) -> Iterator[str]:
    others = " ".join(command.name for command in known if command.name != "run")
    yield "# fish completion for pyvmm, made by: pyvmm completion fish"
    yield "complete -c pyvmm -f"
    for command in known:
        yield (
            f"complete -c pyvmm -n __fish_use_subcommand -a {command.name} "
            f"-d {_fish_text(command.summary)}"
        )
    for command in known:
        seen = f"__fish_seen_subcommand_from {command.name}"
        if command.name == "run":
            seen = f"not __fish_seen_subcommand_from {others}"
        start = f"complete -c pyvmm -n {_fish_text(seen)}"
        for words in command.positions:
            yield f"{start} -a {_fish_text(' '.join(words))}" if words else f"{start} -F"
        for option in command.options:
            names = " ".join(
                f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}"
                for name in option.names
            )
            value = ""
            if option.metavar:
                value = "" if option.is_optional else " -r"
                value += f" -a {_fish_text(' '.join(option.words))}" if option.words else ""
                value += " -F" if option.names_files else " -f"
            yield f"{start} {names}{value} -d {_fish_text(option.help)}"


def _fish_text(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
