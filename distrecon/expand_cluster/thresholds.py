"""Every threshold of a recovery: what it bounds, in which unit, and why it has that size.

Units: a *relative loss* is the mean squared error over the outputs' variance (its root is a relative error; float64's
rounding is at about 1e-31); *noise* is the standard deviation of the answers' rounding noise, in the answers' own unit.
How many probes, lines or rounds a step takes, how far they reach, and what keeps a division from zero is no threshold
and stands with the step; what users may want to change is in config.py.
"""

# Black box
REPEATABLE = 1e-5  # of the largest answer: how far two answers to one query may differ; float32 sums may do so

# Directions (coordinates.py)
LEAST_NOISE = 1e-17  # of the answers' spread: noise is taken to be at least this, so never zero; below any rounding
STRAIGHT_MARGIN = 50.0  # x noise: a second difference above it straddles a kink; noise alone reaches some 10
STRAIGHT_ROUNDING = 1e-15  # of the answers' spread, added to that: the differences' own rounding
GAP = 100.0  # ratio of neighbouring singular values: the widest of at least so much parts gradient from rounding
CONDITION = 1e-3  # of the strongest direction: weaker ones are stretched no further, or probes run far out in them
BLIND = 1e-7  # relative change of an answer that shows a direction not found yet; GAP x noise or error, if larger
NONLINEAR = 0.25  # of the largest nonlinear share of the outputs: the probes' scale is the smallest that reaches it
NONLINEAR_DEEP = 0.5  # the same for students of several hidden layers, which learn from narrow probes far more slowly

# Exactness of a fit
CONVERGED = 1e-29  # relative loss at which the solver stops: a hundred times float64's rounding
NOISE_MARGIN = 5.0  # x noise: relative error of an exact fit to noisy answers, which leaves 1 to 2 (float32)
DIRECTION_MARGIN = 100.0  # x the directions' relative error: likewise in relevant directions, which the fit cannot mend
NEARLY_EXACT = 1e-12  # relative loss: a fit worse than this misses a neuron, whose share is 1e-6 of the outputs or more
PROMISING = 1e-10  # relative loss: a fit below it that still falls when its iterations are over is continued
STILL_FALLS = 0.1  # of the loss before: what a continued fit must fall below to be continued again

# Terms of derivatives (rank_one.py)
RANK_ONE = 1e-10  # squared distance of a unit rank-one matrix from the span: the search has arrived, the rest is linear
SAME_TERM = 1e-6  # 1 - cosine of two such matrices that are the same term; they are found to 1e-5 at least
RESPONDS = 1e-3  # relative loss: a term along which derivatives fit one neuron's response; they do to 1e-11 or better

# First of two layers (saturation.py)
ALONE = 1e-6  # ratio of singular values of the Jacobian where one neuron switches and the others are saturated: 1e-9
SAME_DIRECTION = 1e-6  # 1 - cosine of two directions of one neuron; they are found to 1e-9
SPANNED = 1e-12  # squared share of Jacobians outside the span: slopes and biases are right; 1e-3 before, 1e-17 after

# Students
UNDERFIT = 1e-4  # relative loss: best students of the first-order optimiser that end above it are too narrow
UNDERFIT_SOLVED = 1e-12  # relative loss: the same after the least-squares solver, which ends near rounding or is stuck
TRAINED = 1e-5  # relative loss: deep students train on until their median is below (see docs/recovery.md, 7)

# Neurons of students
LEAST_CONTRIBUTION = 1e-5  # of the standardised outputs: neurons that add less are not clustered; far above rounding
LOSS_MARGIN = 3.0  # x root of the student's loss: likewise, as a smaller contribution may be the fit's own error

# Missing and redundant neurons
COPY = 1e-9  # of a neuron's norm: what is left of it after projection on the others, if it is a copy of them
SINGULAR = 1e-15  # of the largest singular value: smaller ones are rounding, so that coinciding neurons cost nothing
FREE_DROP = 1e-8  # relative loss added: neurons that cost less to drop are candidates for elimination, then tried.
# At least the root of the floor: two neurons that differ by delta do the work of one to delta^2, and one costs that.
KEEPS_FIT = 2.0  # x the loss before: a drop that leaves more than this was of a neuron that is needed
UNFINISHED = 1e-4  # relative loss: a network peeled from students that fits worse misses something; of those that fit
# as well many have redundant neurons alone, which are dropped before the fit has converged: it ends near 1e-6 with them
PURSUED = 1e-4  # relative error of the next pre-activations at which the clustered neurons are enough for a first fit

# Signs
LINEAR_SHARES = (
    1e-14,
    1e-12,
    1e-10,
    1e-8,
    1e-6,
)  # of the neurons' own linear terms: a fitted one's rounding, tried in turn
LINEAR_MARGIN = 30.0  # x the linear term's rounding: what a set of flips may leave of it; a wrong set leaves far more

# Bends
EXPECTED = 0.01  # of the room round a bend: how far from it a known hyperplane may cross; ten times that of its jump
SAME_PLANE = (
    1e-7  # distance of two hyperplanes that are one, at least; ERROR_MARGIN x their errors where these are larger
)
SURELY_OTHER = 0.03  # likewise, at most
ERROR_MARGIN = 100.0  # x an estimated error: what is more is no error; as BEND_MARGIN, below which no bend is seen
ORIENTED = 0.1  # error of a hyperplane's normal from gradients: worse ones are no start
SHOWS = 5.0  # x its standard error: a jump that is less does not show in the answers
COMPLETE = 1e-7  # relative residual: hyperplanes found to 1e-9 leave less, a missing one leaves more
CLEAR = 1e-2  # of the jump between two slopes: their own rounding, where they are to meet in one point
BEND_MARGIN = 100.0  # x noise: differences above it are bends; there are millions, so noise must never reach it
MEETING_MARGIN = 1000.0  # x noise: how far two straight pieces may miss the answer at their crossing (extrapolated)
PURE = 1e-6  # ratio of the second to the first singular value of the gradients' jump, which has rank one at one bend
SAME = 1e-5  # distance of unit vectors that are one hyperplane, or one row: they are found to about 1e-10
LEAST_COMMON = 3  # coordinates that two partial rows must share: two vectors of two are too often parallel by chance,
SAME_IN_TWO = 1e-7  # unless they are so to this distance
LEAST_LINES = 3  # distinct lines that must find a first-layer hyperplane: two bends always lie on one
CROSSED = 0.95  # share of the lines crossing a hyperplane that must bend there; at flat angles noise may hide it

# Verdict
AGREEMENT = 10.0  # x what is due at each answer: root mean square of an output's disagreement; exact recoveries of
# float64 black boxes had at most .1 of it, of float32 ones 2
AGREEMENT_WORST = 100.0  # likewise: the largest of them; these had at most 1 (float64) and 13 (float32)
# x the noise of answers that are multiples of a quantum, which is bounded: 20 and 2 of it are then allowed. Exact
# recoveries of 38 such boxes had at most 16 and 1.7; six of eight networks with a neuron missing had more of one.
BOUNDED = 0.2
NEEDED = 100.0  # x the square of what is due: what dropping any neuron must add; below, the fit does without it
OPPOSITE = 1e-5  # relative distance of the weights of two neurons that are opposites; fits leave 1e-8
VANISHING = 1e-12  # of the largest eigenvalue of a Gram matrix: counts as zero; rounding makes it 1e-15 or so

# Scores against a known teacher
FOUND = 1e-3  # cosine distance: both of a neuron's (incoming, outgoing) are below it when it is found
