"""Who is let in. Rejecting early, before a prompt is computed in vain, is what keeps an overloaded cluster useful."""

from perigee.scheduler.admission.base import Admission, Refusal
from perigee.scheduler.admission.foresight import Foresight
from perigee.scheduler.admission.open import Open
from perigee.scheduler.admission.staged import AtDecode, Early, Prediction

__all__ = ["Admission", "AtDecode", "Early", "Foresight", "Open", "Prediction", "Refusal"]
