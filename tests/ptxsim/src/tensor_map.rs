#[derive(Debug, thiserror::Error)]
#[error("x")]
pub struct TensorMapError;
#[derive(Clone, Debug)]
pub struct TensorMap;
impl TensorMap {
    pub fn validate(&self) -> Result<(), TensorMapError> {
        Ok(())
    }
    pub fn encode(&self) -> [u8; 128] {
        [0; 128]
    }
}
