"""Settings: how to declare one, the command line that is made from them, the checks, and the exit codes.

A command's settings are a dataclass; option() declares a field. A field that is such a dataclass itself
(dice.Sampling) is flattened: its options stand on the command line and in settings.json beside the others."""
import argparse
import difflib
import inspect
import math
import os
import re
import sys
import time
from dataclasses import asdict, field, fields, is_dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

import model as models
from data.files import InputError, read_json, require
from data.processes import Interrupted, is_first, log_info, lost_contact, nvidia_driver, own_device

TINIEST = 1e-30  # as a least value: anything above 0 that float32 can divide by
LARGEST = 10**18  # every integer below it, and the seed after it, has a place in 64 bits

def option(default, help, least=-math.inf, most=math.inf, choices=None, identity=True, base=False,
           contents=False, group=""):
    """A setting. identity: it changes what a run computes, so a run goes on with the same value only. base:
    the models before the first round depend on it, and --start-from does not allow another value. contents:
    it names a file or directory, and the run goes on with the same contents, under any path. group: the title
    in --help of this option and of those after it, up to the next one with a group."""
    about = dict(help=help, least=least, most=most, choices=choices, identity=identity, base=base,
                 contents=contents, group=group)
    return field(default=default, metadata=about)

def all_options(settings_class):
    """name -> field of every option of a settings class, those of its nested classes included."""
    found = {}
    for f in fields(settings_class):
        if is_dataclass(f.type):
            found |= all_options(f.type)
        elif f.metadata:
            found[f.name] = f
    return found

def build(settings_class, values):
    """An object of a settings class from {name: value}, nested classes included."""
    given = {}
    for f in fields(settings_class):
        if is_dataclass(f.type):
            given[f.name] = build(f.type, values)
        elif f.name in values:
            given[f.name] = values[f.name]
    return settings_class(**given)

def as_dict(settings):
    """{name: value} of all settings, those of the loss included: what settings.json holds."""
    values = asdict(settings)
    for name, value in [*values.items()]:
        if isinstance(value, dict):  # a nested class, or the options of the loss
            values |= values.pop(name)
    return values

# ---------------------------------------------------------------------------------------- Losses
class Loss(NamedTuple):
    fn: object
    parameters: tuple  # the names of fn's parameters
    options: dict  # name -> option that it declares itself
    defaults: dict  # name -> its own default for a setting of the run

    def __call__(self, terms, own):
        """(losses, columns to log): fn with the terms that it names and its own options."""
        result = self.fn(**{name: (own | terms)[name] for name in self.parameters})
        losses, columns = result if isinstance(result, tuple) else (result, {})
        for name, values in {"its losses": losses, **columns}.items():
            if values.shape != terms["pi_w"].shape or name in LOGGED:
                raise TypeError(f"{self.fn.__name__}: {name} must have the shape (B,) and a name of its own")
        return losses, columns

LOGGED = ("stage", "step", "loss", "accuracy", "margin", "grad_norm", "lr")

class Losses(dict):
    """name -> Loss: the table of all losses. add() puts one in, under the name of its function.

    A parameter of a loss is a term of a pair (one of the inputs, with _w or _l), one of the given settings of
    the run, or an option that add() declares. Anything else, and a clash of names, is an error at import."""
    def __init__(self, settings_class, inputs, settings):
        self.settings = all_options(settings_class)
        self.own = {}  # name -> option, of all losses
        self.terms = {f"{name}_{side}" for name in inputs for side in "wl"} | {*settings}

    def add(self, **declared):
        """For @LOSSES.add(...). name=option(...) declares an option of this loss; name=value is its own
        default for a setting of the run."""
        own = {name: f for name, f in declared.items() if hasattr(f, "metadata")}
        defaults = {name: value for name, value in declared.items() if name not in own}

        def register(fn):
            name = fn.__name__.removesuffix("_loss").replace("_", "-")
            parameters = tuple(inspect.signature(fn).parameters)
            clash = own.keys() & (self.settings.keys() | self.terms)
            # A parameter that is not declared, or declared and no parameter, or a default of no setting.
            unknown = {*parameters} - self.terms ^ own.keys() | defaults.keys() - self.settings.keys()
            if clash or unknown:
                raise TypeError(f"loss {name}: {', '.join(clash | unknown)} must be a parameter and declared "
                                "in LOSSES.add(), with a name that no setting has, or be one of the terms "
                                f"{', '.join(sorted(self.terms))}")
            self[name] = Loss(fn, parameters, own, defaults)
            self.own.update(own)
            return fn
        return register

    def needs(self, name, term):
        """Does a loss read this input ("kl", "score", ...)?"""
        return f"{term}_w" in self[name].parameters

    def options_of(self, name, given):
        """The values of a loss's own options: given, or the defaults. InputError for one of another loss."""
        require(name in self, f"--loss {name}: choose one of {', '.join(self)}")
        own, values = self[name].options, {}
        for other in given:
            losses = " or ".join(loss for loss in self if other in self[loss].options)
            require(other in own, f"{flag(other)} {given[other]}: --loss {name} does not read it; it belongs "
                    f"to --loss {losses}")
        for key, f in own.items():
            values[key] = given.get(key, f.default)
            check_value(key, values[key], f)
        return values

# ---------------------------------------------------------------------------------------- The command line
def flag(name):
    return "--" + name.replace("_", "-")

def add_arguments(parser, options, values={}, note=""):
    """A flag for each option. None has a default here, so only what was given is in the result. values: what
    the help shows in brackets, in place of the defaults."""
    group = parser
    for name, f in options.items():
        kind, value = type(f.default), values.get(name, f.default)
        if f.metadata["group"]:
            group = parser.add_argument_group(f.metadata["group"])
        metavar = "PATH" if f.metadata["contents"] else {int: "N", float: "X", str: "TEXT"}[kind]
        if f.metadata["choices"]:
            metavar = one_of(f.metadata["choices"])
        text = note + f.metadata["help"] + (f" [{value}]" if value != "" else "")
        group.add_argument(flag(name), type=kind, metavar=metavar, help=text.replace("%", "%%"))

def one_of(names):
    return "{%s}" % ",".join(names)

def make_parser(description, options, losses, values):
    """The parser of dice.py. values: what its help shows in brackets."""
    model = values.get("model", options["model"].default)
    description += (f"\nIn brackets: the value with --model {model}. For those of another model:\n"
                    "python dice.py --model NAME --help")
    epilog = ["presets (--model NAME; of a reward model --reward NAME):"]
    for name, preset in models.PRESETS.items():
        epilog.append(f"  {name:23}{preset.repository or 'made from nothing, with data of its own'}")
    parser = argparse.ArgumentParser(usage="python dice.py [options]", description=description,
                                     epilog="\n".join(epilog), add_help=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-h", "--help", action="store_true", help="show this text and exit")
    parser.add_argument("--preset", metavar="NAME", help="its settings, for another --model")
    parser.add_argument("--dry-run", action="store_true", help="check the input, measure the machine and "
                        "print the plan with sizes and times; write nothing, download no preset")
    add_arguments(parser, options, values)
    known = parser._option_string_actions  # flag -> what argparse knows of it
    known["--loss"].metavar = one_of(losses)
    for name, loss in losses.items():
        own = {key: f for key, f in loss.options.items() if flag(key) not in known}  # not another loss's too
        add_arguments(known["--loss"].container, own, values, f"of --loss {name}: ")
    return parser

def read_arguments(parser, argv):
    """parser.parse_args, with a hint for an option that is misspelled."""
    args, unknown = parser.parse_known_args(argv)
    name = unknown[0].split("=")[0] if unknown else ""
    close = difflib.get_close_matches(name, parser._option_string_actions, 1)
    hint = f"did you mean {close[0]}?" if close else "see --help"
    require(not unknown, f"{' '.join(unknown)}: no such option; {hint}")
    return args

def parse(settings_class, description, losses, argv=None):
    """The command line of dice.py -> (settings, is it a dry run?). The value of a setting is the given one,
    else a newly chosen loss's, else that of --start-from's run, else the preset's, else the default."""
    options, presets = all_options(settings_class), {name: p.settings for name, p in models.PRESETS.items()}
    parser = make_parser(description, options, losses, {})
    given = {name: value for name, value in vars(read_arguments(parser, argv)).items() if value is not None}
    dry_run, wants_help = given.pop("dry_run"), given.pop("help")
    inherited = inherit(given, options | losses.own) if "start_from" in given else {}
    loss, loss_defaults = given.get("loss", inherited.get("loss", options["loss"].default)), {}
    if loss != inherited.get("loss"):  # another loss has other options and defaults
        old = losses[inherited["loss"]].defaults if inherited else {}
        inherited = {name: value for name, value in inherited.items() if name in options and name not in old}
        loss_defaults = losses[loss].defaults if loss in losses else {}
    model = given.get("model", inherited.get("model", options["model"].default))
    name = given.pop("preset", model)
    require(name in presets or name == model, f"--preset {name}: choose one of {', '.join(presets)}")
    preset = dict(presets.get(name, {}))
    if name != model:  # these belong to the preset's own model
        preset = {key: value for key, value in preset.items() if key not in ("reference", "chat", "system")}
    if "preferences" in given:
        preset.pop("prompts", None)  # they belong to the preset's own preferences
    values = preset | inherited | loss_defaults | given
    if wants_help:
        make_parser(description, options, losses, values).print_help()
        parser.exit()
    settings = build(settings_class, values)
    settings.of_losses = losses.own  # for what an absent one of them is in the settings.json of an older run
    settings.loss_options = losses.options_of(loss, {k: v for k, v in values.items() if k not in options})
    settings.of_paper = name not in presets and not inherited
    settings.loads_reference = losses.needs(loss, "kl")  # the network, to train with it
    settings.out = settings.out or f"out/{os.path.basename(os.path.abspath(settings.model))}"
    resolve(settings)
    if dry_run:
        replace_missing(settings)
    return settings, dry_run

def replace_missing(settings):
    """For a dry run, which downloads nothing: random weights of its shape stand in for a preset's model."""
    s, missing = settings, []
    for name in (s.model, s.reference, s.reward, s.judge):
        repository = models.PRESETS[name].repository if name in models.PRESETS else ""
        if repository and not models.place(repository).exists():
            missing.append(name)
        there = name in models.PRESETS or os.path.exists(name) or not models.REPOSITORY.fullmatch(name)
        require(there or models.place(name).exists(), f"{name}: is not downloaded, and a dry run downloads "
                "nothing; give a preset, or leave out --dry-run to download it")
    if missing and is_first():
        log_info(f"not downloaded: {', '.join(missing)}; a dry run downloads nothing, so random weights "
                 "of the same shape stand in")
    if s.model in missing:
        s.weights = "dummy"
    if s.reference in missing:
        s.reference = s.model  # of the same shape
    if s.reward in missing:
        s.reward = "gold"  # the other one that reads no model
    if s.judge in missing:
        s.judge = s.judge_prompts = ""

def inherit(given, options):
    """The settings that --start-from takes over from the other run. InputError if there is no such run, or if
    a given setting would change its models. given["start_from"] becomes the run that made the models."""
    directory = given["start_from"]
    known = read_json(Path(directory) / "settings.json")
    require(known, f"--start-from {directory}: is not there, or is no run (no settings.json in it)")
    require("out" in given, f"--start-from {directory}: give --out DIR too, a directory for the new run")
    given["start_from"] = known.pop("start_from", "") or str(Path(directory).resolve())
    for name, value in given.items():
        if name in options and options[name].metadata["base"]:
            made = known.get(name, options[name].default)
            require(value == made, f"{flag(name)} {value}: the models of {directory} were made with {made}; "
                    "leave it out, or leave out --start-from")
    return {name: known[name] for name, f in options.items() if name in known and f.metadata["identity"]}

# ---------------------------------------------------------------------------------------- Checks
def check_value(name, value, f):
    """InputError if a value is not one of an option's choices, or not in its range."""
    least, most, choices = f.metadata["least"], f.metadata["most"], f.metadata["choices"] or (value,)
    require(value in choices, f"{flag(name)} {value}: choose one of {', '.join(map(str, choices))}")
    if type(f.default) in (int, float):
        most = min(most, LARGEST) if type(f.default) is int else most
        bound = f"at least {least:g}" + (f" and at most {most:g}" if most < math.inf else "")
        require(least <= value <= most and value < math.inf, f"{flag(name)} {value}: must be {bound}")

def read_alpha(text):
    """--alpha ("auto", "2x" or a number) -> (number, is it a multiple of alpha*?). ValueError for others."""
    if text == "auto":
        return 1.0, True
    return float(text.removesuffix("x")), text.endswith("x")

def resolve(settings):
    """Check all settings, alone and with each other, and decide what device and dtype "auto" are."""
    s, values = settings, as_dict(settings)
    for name, f in all_options(type(s)).items():
        check_value(name, values[name], f)
    try:
        number, is_multiple = read_alpha(s.alpha)
    except ValueError:
        number = math.nan
    require(0 <= number < math.inf,
            f"--alpha {s.alpha}: must be auto, 2x (twice what auto finds), or a number of at least 0")
    # One text for one value: 0 and 0.0 are the same, and so are auto and 1x.
    s.alpha = "auto" if (number, is_multiple) == (1, True) else f"{number}{'x' * is_multiple}"
    require(s.reward != "gold" or (s.model == "tiny" and not s.prompts and not s.preferences),
            "--reward gold: judges the tiny world alone; leave out --model, --prompts and --preferences")
    require(s.reward == "implicit" or s.reward_reference == "previous",
            f"--reward-reference {s.reward_reference}: needs --reward implicit, not {s.reward}")
    require(bool(s.judge) == bool(s.judge_prompts), "--judge and --judge-prompts: give both, or none")
    require(not s.judge or s.model != "tiny", f"--judge {s.judge}: the tiny world has a judge of its own")
    require(s.weights == "real" or s.model != "tiny", "--weights dummy: stands in for a --model NAME only")
    require(s.min_chars + 1 < s.max_chars, f"--min-chars {s.min_chars}: no answer is longer than that and "
            f"shorter than --max-chars {s.max_chars}; give a smaller one")
    require(not s.reference or s.model != "tiny", f"--reference {s.reference}: give its --model too")
    for name in (s.model, s.reference):  # before it is downloaded
        shape = models.PRESETS[name].shape if name in models.PRESETS else None
        require(not shape or not shape.num_labels, f"{name}: is a reward model; give it to --reward")
    require(re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", s.device),
            f"--device {s.device}: must be auto, cpu, mps, cuda, or one GPU by its number, such as cuda:1")
    if s.device == "auto":
        s.device = "cuda" if torch.cuda.is_available() else "cpu"
        driver = "" if s.device == "cuda" else nvidia_driver()
        made_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs only"
        require(not driver, f"--device auto: there is an NVIDIA GPU (driver {driver}), but torch "
                f"{torch.__version__}, made for {made_for}, cannot use it; update the driver (CUDA 13 needs "
                "580), install a torch that fits the driver, or give --device cpu to run on the CPU")
    if s.dtype == "auto":
        s.dtype = "bfloat16" if s.device.startswith("cuda") else "float32"
    try:
        torch.empty(1, device=own_device(s.device))
    except (RuntimeError, AssertionError) as error:  # a device that is not there
        raise InputError(f"--device {s.device}: {str(error).splitlines()[0]}") from None

def check_data(s, data):
    """InputError if a stage lacks the data that it needs."""
    offline = data.preferences
    path = Path(os.path.expanduser(s.model))
    close = difflib.get_close_matches(s.model, models.PRESETS, 1)
    hint = f"did you mean {close[0]}?" if close else f"the presets are {', '.join(models.PRESETS)}"
    require(s.model in models.PRESETS or path.exists() or models.REPOSITORY.fullmatch(s.model),
            f"--model {s.model}: not a model directory, a preset or ORGANISATION/NAME on the hub; {hint}")
    runs = [path for path in [*Path(s.model).parents][:2] if (path / "settings.json").exists()]
    begin = f", or --start-from {runs[0]} to begin with the SFT and DPO models of that run" if runs else ""
    require(data.prompts or offline,
            f"nothing to sample for: give --prompts FILE or --preferences FILE{begin}")
    require(not (s.sft_steps and s.reference), f"--sft-steps {s.sft_steps}: a policy with a --reference is "
            "trained already; give --sft-steps 0, or no --reference")
    require(offline or not s.sft_steps,
            f"--sft-steps {s.sft_steps}: needs answers to learn; give --preferences FILE")
    require(not s.rounds or s.reward != "implicit" or s.reference or s.dpo_steps, "--dpo-steps 0: the "
            "implicit reward needs a policy that DPO has trained; give --reference DIR, or --dpo-steps 300")
    require(offline or s.reference or not s.dpo_steps, "DICE needs a DPO-trained policy: give --reference "
            "DIR, which --model was trained from, or --preferences FILE to train it with DPO first")
    require(offline or not s.gamma or not s.rounds, f"--gamma {s.gamma}: there are no offline pairs to "
            "replay; give --preferences FILE, or --gamma 0 to do without")
    if s.data_filter != "none" and not s.rounds and s.reward == "implicit" and is_first():
        log_info(f"--data-filter {s.data_filter}: does nothing with --rounds 0; it filters the rounds' pairs")

def check_scores(rows, s):
    """InputError if a pair has no scores, or none that a loss can take the log of their difference of."""
    for row in rows:
        chosen, rejected = np.float32(row.scores or (math.nan, math.nan))
        require(chosen > rejected, f'{row.where}: --loss {s.loss} needs "score_chosen" above '
                '"score_rejected" in float32; correct or remove the row')

def report_unused(rows, pairs, limit, s):
    """Log how many offline pairs are left out. InputError if all are."""
    same = sum(row.chosen == row.rejected for row in rows)
    long = len(rows) - len(pairs) - same
    if long or same:
        log_info(f"{len(pairs)} of {len(rows)} offline pairs are used: {long} are longer than {limit} tokens,"
                 f" {same} have the same answer twice")
    require(pairs or long or not rows, f"{s.preferences}: every pair has the same answer twice; give others")
    require(pairs or not rows, f"{s.preferences or 'stand-in pairs'}: no pair can be used within {limit} "
            "tokens; raise --max-tokens, or take a model with a longer context")

def no_usable_prompt(samples, s):
    cut = sum(x.finish == "length" for x in samples)
    unknown = sum(math.isnan(x.reward) for x in samples)
    least = max(2, s.min_valid * s.samples)
    return InputError(f"no prompt has {least:g} usable answers, two of them different "
                      f"({cut} of {len(samples)} were cut by the length limit, {unknown} got no reward); "
                      "raise --max-new-tokens or --temperature, or lower --min-valid")

def nothing_to_prefer(count):
    return InputError(f"all answers to a prompt have the same reward, for each of {count} prompts; check "
                      "--reward and the two models")

# ---------------------------------------------------------------------------------------- Exit codes
def command(name):
    """Decorator of main(argv). Exit codes: 0; 2 for bad input, or a file that cannot be read or written; 130
    after Ctrl-C; 1 if another process has ended; each with one line on stderr. 141 if the reader of the
    output has gone. Other errors are bugs and keep their traceback."""
    def decorate(main):
        def wrapped(argv=None):
            open_streams()
            try:
                code, text = outcome(main, argv)
                if text:
                    print(f"{name}: {text}", file=sys.stderr)
            except BrokenPipeError:  # after "| head", for example
                code = 141
                for number in (1, 2):  # what is still in a buffer goes nowhere
                    os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            return code
        return wrapped
    return decorate

def open_streams():
    """A closed standard stream becomes the null device. Else the next file that is opened would get its
    number, and what is printed would be written into that file."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))
            os.dup2(getattr(sys, name).fileno(), number)

def outcome(main, argv):
    """main(argv) -> (exit code, what to say on stderr)."""
    try:
        code = main(argv) or 0
        sys.stdout.flush()
        return code, ""
    except InputError as error:
        # With torchrun all processes meet the same bad input. The first one says so, and torchrun ends the
        # others while they wait.
        if not is_first() and not error.alone:
            time.sleep(10)
        return 2, str(error)
    except (Interrupted, KeyboardInterrupt) as error:
        return 130, (str(error) or "interrupted") if is_first() else ""
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        what = error.strerror or str(error)
        full = any(text in what for text in ("No space left", "quota exceeded"))
        advice = "; make room there, and give the same command to go on" if full else ""
        return 2, str(InputError(f"{where}{what}{advice}"))
    except RuntimeError as error:
        if not lost_contact(error):
            raise
        return 1, "another process of this run has ended; give the same command to go on"
