"""Tags by which one part knows what another has written into a run."""

from __future__ import annotations

KIND = "muon_rl.kind"  # "sweep" marks a sweep's parent, "comparison" a comparison
PAUSES = "muon_rl.pauses"  # JSON: begin and end of each time a run stood still, ms since 1970
