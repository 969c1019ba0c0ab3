"""Words that several commands share."""

JUDGE = (
    "The figure of the verdict, as report.json names it. Default: a distance of samples that all "
    "have, else PSNR."
)
