"""The table of datasets: name in an option file -> "module:Class", imported only when it is built."""

DATASETS = {
    "VideoRecurrentTrainDataset": "data.video:VideoRecurrentTrainDataset",
    "VideoRecurrentTestDataset": "data.video:VideoRecurrentTestDataset",
    "SyntheticVideoDataset": "data.synthetic:SyntheticVideoDataset",
}
