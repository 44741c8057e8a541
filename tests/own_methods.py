"""Methods that a user might bring: found by name on the path, like `--method.name own_methods:Held`."""

import os
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from fedpipe_ray import lora
from fedpipe_ray.message import Message
from fedpipe_ray.methods.lora import Lora
from fedpipe_ray.train import process_group


@dataclass(frozen=True, kw_only=True)
class Held(Lora):
    """LoRA. While HOLD names a folder, edge c writes `held` there after three rounds, and waits for `go`."""

    def local_update(self, order, site, rng):
        hold = os.environ.get("HOLD")
        if hold and site.name == "c" and site.round >= 3:
            Path(hold, "pid").write_text(str(os.getpid()))
            Path(hold, "held").touch()
            while not Path(hold, "go").exists():
                time.sleep(0.01)
        return super().local_update(order, site, rng)


@dataclass(frozen=True, kw_only=True)
class Waiting(Lora):
    """LoRA whose edges wait in their first round for `go` in the folder `hold`; their process's id is a file there."""

    hold: str = ""

    def local_update(self, order, site, rng):
        Path(self.hold, str(os.getpid())).touch()
        while site.round == 0 and not Path(self.hold, "go").exists():
            time.sleep(0.01)
        return super().local_update(order, site, rng)


@dataclass(frozen=True, kw_only=True)
class Counting(Held):
    """LoRA whose edges add what they drew in all rounds so far to their update."""

    def local_update(self, order, site, rng):
        update = super().local_update(order, site, rng)
        before = site.private.tensors["drawn"] if site.private else torch.zeros(3)
        site.private = Message({"drawn": before + torch.from_numpy(rng.random(3)).float()})
        mean = site.private.tensors["drawn"].mean()
        return Message({name: tensor + 1e-3 * mean for name, tensor in update.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Spoilt(Lora):
    """LoRA that gets worse and worse after its second round."""

    def aggregate(self, state, reports, server, round, rng):
        after = super().aggregate(state, reports, server, round, rng)
        return after if round < 2 else Message({n: -9 * t if "lora_B" in n else t for n, t in after.tensors.items()})


@dataclass(frozen=True, kw_only=True)
class Slow(Lora):
    """LoRA whose second round takes hours while HOLD names a folder, in which `held` is written when it begins."""

    def local_update(self, order, site, rng):
        if "HOLD" in os.environ and site.round == 1:
            Path(os.environ["HOLD"], "held").touch()
            site.train(lora.attach(site.base, self.spec(site)), rng, steps=10**7)
        return super().local_update(order, site, rng)


@dataclass(frozen=True, kw_only=True)
class Mortal(Lora):
    """LoRA whose edge a loses the second of its processes in its second round, unless the file `killed` is there."""

    killed: str = ""

    def local_update(self, order, site, rng):
        if (site.name, site.round, process_group()[0]) == ("a", 1, 1) and not Path(self.killed).exists():
            Path(self.killed).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().local_update(order, site, rng)


@dataclass(frozen=True, kw_only=True)
class Struck(Counting):
    """Counting whose edge b is struck in its second round, `times` times, with a file in the folder `marks` each time.

    how: `kill`, `hang`, `raise`; or `forget`: killed, and everybody's private state in `private` is gone.
    """

    how: str = "kill"
    times: int = 1
    marks: str = ""
    private: str = ""

    def local_update(self, order, site, rng):
        marks = Path(self.marks)
        done = len(list(marks.iterdir()))
        if (site.name, site.round) == ("b", 1) and done < self.times:
            (marks / str(done)).touch()
            if self.how == "raise":
                raise RuntimeError("struck")
            if self.how == "hang":
                time.sleep(10**6)
            if self.how == "forget":
                shutil.rmtree(self.private)
            os.kill(os.getpid(), signal.SIGKILL)
        return super().local_update(order, site, rng)


@dataclass(frozen=True, kw_only=True)
class Deadly(Lora):
    """LoRA whose process is killed the first time, after it wrote its id to the file `flag`."""

    flag: str = ""

    def local_update(self, order, site, rng):
        if not Path(self.flag).exists():
            Path(self.flag).write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)
        return super().local_update(order, site, rng)
