"""Who is let in. Rejecting early, before a prompt is computed in vain, is what keeps an overloaded cluster useful."""

from perigee.scheduler.admission.base import Admission, Refusal
from perigee.scheduler.admission.early import Early
from perigee.scheduler.admission.open import Open

__all__ = ["Admission", "Early", "Open", "Refusal"]
