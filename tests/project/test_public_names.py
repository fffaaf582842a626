from __future__ import annotations

import ritornello


def test_the_public_names() -> None:
    assert ritornello.__all__ == [
        "Assignment",
        "BufferClosedError",
        "BufferStats",
        "CheckpointError",
        "ClassBalanced",
        "ClassBalancedReservoir",
        "ClassBalancedSampling",
        "ComposedSteps",
        "Contents",
        "EarlierTasks",
        "Fifo",
        "FirstOffered",
        "Forgotten",
        "GraspEviction",
        "GraspSampling",
        "GreedyBalanced",
        "PeerLostError",
        "PerClassRandom",
        "RehearsalBuffer",
        "Reservoir",
        "RoundError",
        "SamplingPolicy",
        "SavedFolder",
        "SavedRepresentatives",
        "SavedShards",
        "SelectionPolicy",
        "Transport",
        "UniformSampling",
        "__version__",
        "at_random",
        "closest_to_mean",
        "evenly",
        "forget",
        "herding",
        "rank_of_exemplar",
        "rehearse",
        "share_of_new",
    ]
    assert all(hasattr(ritornello, name) for name in ritornello.__all__)
