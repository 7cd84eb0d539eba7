"""What the paper reports (Löwe, O'Connor and Veeling 2019), to stand beside what is measured."""

from __future__ import annotations

from gim_stagewise.config import Mode

# Table 1: test accuracy on STL-10 in percent; deviations over 4 runs.
TABLE_1: tuple[tuple[str, Mode | None, str], ...] = (
    ("Deep InfoMax (Hjelm et al. 2019; quoted)", None, "78.2"),
    ("Predsim (Nøkland and Eidnes 2019; quoted)", None, "80.8"),
    ("Randomly initialized", "random", "27.0"),
    ("Supervised", "supervised", "71.4"),
    ("Greedy Supervised", "greedy_supervised", "65.2"),
    ("CPC", "cpc", "80.5 ± 3.1"),
    ("Greedy InfoMax (GIM), simultaneous", "simultaneous", "81.9 ± 0.3"),
    # Not in the table, but in the text of section 4.1.
    ("Greedy InfoMax (GIM), iterative", "iterative", "79.8"),
)

# Table 2: memory of a GPU during training in GB; the mode, and for the last the module.
TABLE_2: tuple[tuple[str, Mode, int | None, str], ...] = (
    ("Supervised", "supervised", None, "6.3"),
    ("CPC", "cpc", None, "7.7"),
    ("GIM, all modules", "simultaneous", None, "7.0"),
    ("GIM, 1st module", "iterative", 1, "2.5"),
)

# Table 3: test accuracies on LibriSpeech in percent, of phones and of speakers.
TABLE_3: tuple[tuple[str, Mode | None, str, str], ...] = (
    ("Randomly initialized", "random", "27.6", "1.9"),
    ("MFCC features", None, "39.7", "17.6"),
    ("Supervised", "supervised", "77.7", "98.9"),
    ("Greedy Supervised", "greedy_supervised", "73.4", "98.7"),
    ("CPC", "cpc", "64.9", "99.6"),
    ("Greedy InfoMax (GIM), simultaneous", "simultaneous", "62.5", "99.4"),
    ("Greedy InfoMax (GIM), iterative", "iterative", "", ""),
)

# Table 4: the same of ablated context networks.
TABLE_4 = (
    ("Greedy InfoMax (GIM)", "62.5", "99.4"),
    ("GIM without BPTT", "55.5", "99.2"),
    ("GIM without g_ar", "50.8", "99.1"),
)
