//! Distributed shared memory and multicast.

use ptxsim::tensor_map::{Dtype, TensorMap};
use ptxsim::{Arg, Launch};

use crate::support::compare::{generator, steps};
use crate::support::run::{clean, compiled};

fn launch(blocks: usize, cluster: usize) -> Launch {
    Launch { cluster: [cluster as u32, 1, 1], ..Launch::linear(blocks as u32, 128) }
}

#[test]
fn cluster_sums() {
    for cluster in [1, 2, 4] {
        let (module, mut device) = compiled("cluster", "sm_90a");
        let blocks = 3 * cluster;
        let data: Vec<f32> = steps(&mut generator("cluster sums"), blocks * 128);
        let sums: Vec<f32> = data.chunks(cluster * 128).map(|part| part.iter().sum()).collect();
        let input = device.buffer("in", &data);
        let pulled = device.uninitialised::<f32>("pulled", blocks);
        let pushed = device.uninitialised::<f32>("pushed", 3);
        let launch = launch(blocks, cluster);
        clean(&mut device, &module, "cluster_sum", launch, &[input.into(), pulled.into()]);
        clean(&mut device, &module, "cluster_push", launch, &[input.into(), pushed.into()]);
        let every: Vec<f32> = (0..blocks).map(|block| sums[block / cluster]).collect();
        assert_eq!(device.read::<f32>(pulled), Ok(every), "cluster of {cluster}");
        assert_eq!(device.read::<f32>(pushed), Ok(sums), "cluster of {cluster}");
    }
}

#[test]
fn multicast() {
    for cluster in [1, 2, 4] {
        let (module, mut device) = compiled("cluster", "sm_90a");
        let blocks = 2 * cluster;
        let data: Vec<f32> = steps(&mut generator("multicast"), 2 * 1024);
        let input = device.buffer("in", &data);
        let out = device.uninitialised::<f32>("out", blocks * 1024);
        let map = TensorMap {
            address: device.address(input),
            ..TensorMap::dense(Dtype::F32, vec![64, 32], vec![64, 16 / cluster as u32])
        };
        let args = [Arg::TensorMap(map), out.into()];
        let launch = launch(blocks, cluster);
        let report = clean(&mut device, &module, "cluster_multicast", launch, &args);
        let read = report.buffers.iter().find(|b| b.name == "in").map(|b| b.traffic.read);
        assert_eq!(read, Some(2 * 1024 * 4), "what goes to several blocks is read once");
        let want = |i: usize| {
            let block = i / 1024;
            data[block / cluster * 1024 + i % 1024] + block as f32
        };
        let want = (0..blocks * 1024).map(want).collect();
        assert_eq!(device.read::<f32>(out), Ok(want), "cluster of {cluster}");
    }
}
